"""The queue of prompts whose answers invited annotators rank: `store.labels`.

    item         a fixed prompt; its answers are drawn when it is first handed out, and are a group
    assignment   an item in an annotator's hands: open -> done by a ranking, or skipped

An item goes to `overlap` annotators, in the order of the file. One who has an open item gets it again; who leaves one open
for a day loses it to the next. A skipped item does not come back to who skipped it, and counts for nobody.

Agreement of two annotators is the share of pairs of answers, ranked by both without a tie, that both put in one order.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, exists, func, insert, or_, select, update

from alignfast.online.feedback import Prompt, storable
from alignfast.online.store.records import present, to_vote
from alignfast.online.store.tables import feedback, label_assignments, label_items, responses
from alignfast.online.voters import Agreement, agreement, judgements

if TYPE_CHECKING:
    from alignfast.data.intervals import Interval
    from alignfast.online.store.store import Store

_OPEN_SECONDS = 86_400.0  # until an item that was handed out and not ranked goes to another annotator


class Item(NamedTuple):
    """A prompt of the queue.

    Attributes:
        id: of the item.
        prompt: a text, or messages.
        group_id: of its answers; None until they are drawn.
    """

    id: str
    prompt: Prompt
    group_id: str | None


@dataclass(frozen=True)
class Annotator:
    """What one annotator has done.

    Attributes:
        user: whose rankings these are.
        ranked: items.
        agreement: with the majority of the others; None where nobody else ranked the same.
    """

    user: str
    ranked: int
    agreement: Agreement | None


@dataclass(frozen=True)
class LabelStats:
    """How far the queue is, and how far its annotators agree.

    Attributes:
        items: in the queue.
        done: of those, ranked by as many annotators as was asked for.
        compared: pairs of answers, each for two annotators who ranked it.
        agreement: share of those in one order, items the unit; None before there are any.
        annotators: who has ranked, most items first.
    """

    items: int
    done: int
    compared: int
    agreement: Interval | None
    annotators: tuple[Annotator, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        annotators = []
        for one in self.annotators:
            found = one.agreement
            agreed = {} if found is None else {"agreed": found.agreed, "others": found.others}
            annotators.append(
                {
                    "user": one.user, "ranked": one.ranked, "compared": 0 if found is None else found.compared,
                    "flagged": found is not None and found.flagged, **agreed,
                }
            )  # fmt: skip
        share = None if self.agreement is None else self.agreement._asdict()
        return {
            "items": self.items, "done": self.done, "compared": self.compared, "agreement": share,
            "annotators": annotators,
        }  # fmt: skip


class Labels:
    """See the module."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, prompts: Iterable[Prompt]) -> int:
        """Put prompts behind those of the queue, less those that are in it.

        Returns:
            How many there were not.
        """
        wanted: dict[str, Any] = {}
        for prompt in prompts:
            kept = storable(prompt)
            wanted.setdefault(_item_id(kept), kept)

        def work(connection: Connection) -> int:
            known = present(connection, label_items.c.id, wanted)
            last = connection.execute(select(func.max(label_items.c.place))).scalar() or 0
            fresh = [(id, prompt) for id, prompt in wanted.items() if id not in known]
            rows = [
                {"id": id, "prompt": prompt, "place": place}
                for place, (id, prompt) in enumerate(fresh, last + 1)
            ]
            if rows:
                connection.execute(insert(label_items), rows)
            return len(rows)

        return self._store.write(work)

    def any(self) -> bool:
        """Whether there is a prompt in the queue."""
        with self._store.read() as connection:
            return connection.execute(select(label_items.c.id).limit(1)).first() is not None

    def next(self, user: str, overlap: int) -> Item | None:
        """The item that an annotator ranks now; None: there is none left for them.

        Args:
            user: the annotator.
            overlap: how many annotators rank each item.

        Raises:
            ValueError: overlap is below 1.
        """
        if overlap < 1:
            raise ValueError(f"overlap must be 1 or more, got {overlap}")

        def work(connection: Connection) -> Item | None:
            mine = and_(label_assignments.c.item == label_items.c.id, label_assignments.c.user_id == user)
            items = select(label_items).order_by(label_items.c.place).limit(1)
            unranked = ~_ranked(user)
            held = exists().where(mine, ~label_assignments.c.skipped, _in_hands())
            found = connection.execute(items.where(held, unranked)).first()
            if found is None:
                free = and_(unranked, ~exists().where(mine, label_assignments.c.skipped), _taken() < overlap)
                found = connection.execute(items.where(free)).first()
                if found is None:
                    return None
                _assign(connection, found.id, user)
            return Item(found.id, found.prompt, found.group_id)

        return self._store.write(work)

    def left(self, user: str, overlap: int) -> int:
        """How many items wait for an annotator, the one in their hands among them."""
        mine = and_(label_assignments.c.item == label_items.c.id, label_assignments.c.user_id == user)
        held = exists().where(mine, ~label_assignments.c.skipped, _in_hands())
        free = and_(~exists().where(mine, label_assignments.c.skipped), _taken() < overlap)
        statement = select(func.count()).select_from(label_items).where(~_ranked(user), or_(held, free))
        with self._store.read() as connection:
            return connection.execute(statement).scalar_one()

    def skip(self, item: str, user: str) -> None:
        """Give back an item for good.

        Raises:
            ValueError: it is not in the annotator's hands.
        """
        held = and_(label_assignments.c.item == item, label_assignments.c.user_id == user)

        def work(connection: Connection) -> None:
            if not connection.execute(update(label_assignments).where(held).values(skipped=True)).rowcount:
                raise ValueError(f"the item {item!r} is not in your hands")

        self._store.write(work)

    def group_of(self, item: str) -> str | None:
        """Which answers an item has; None before they are drawn."""
        with self._store.read() as connection:
            return connection.execute(select(label_items.c.group_id).where(label_items.c.id == item)).scalar()

    def drawn(self, item: str, group_id: str) -> str:
        """Say which answers an item has; the first word counts, unless those answers are gone.

        Returns:
            The group that they are.
        """

        def work(connection: Connection) -> str:
            before = connection.execute(
                select(label_items.c.group_id).where(label_items.c.id == item)
            ).scalar_one()
            if before is not None and present(connection, responses.c.group_id, [before]):
                return str(before)
            connection.execute(update(label_items).where(label_items.c.id == item).values(group_id=group_id))
            return group_id

        return self._store.write(work)

    def stats(self, overlap: int) -> LabelStats:
        """How far the queue is, and how far its annotators agree."""
        from alignfast.data.intervals import proportion  # imports torch: a rollback does without

        statement = (
            select(feedback)
            .join(label_items, feedback.c.target == "group:" + label_items.c.group_id)
            .where(feedback.c.current, feedback.c.kind == "ranking")
            .order_by(feedback.c.seq)
        )
        with self._store.read() as connection:
            items = connection.execute(select(func.count()).select_from(label_items)).scalar_one()
            rankings = [(row.target, to_vote(row)) for row in connection.execute(statement)]
        of_item: dict[str, int] = defaultdict(int)
        ranked: dict[str, int] = defaultdict(int)
        orders: dict[Any, list[bool]] = defaultdict(list)
        said = []
        for target, vote in rankings:
            of_item[target] += 1
            ranked[vote.user] += 1
            for one in judgements(vote, vote.among):
                said.append(one)
                orders[target, one.item].append(one.yes)
        same = [(a == b, target) for (target, _), yes in orders.items() for a, b in combinations(yes, 2)]
        agreed = {one.user: one for one in agreement(said)}
        annotators = [Annotator(user, number, agreed.get(user)) for user, number in ranked.items()]
        return LabelStats(
            items=items,
            done=sum(number >= overlap for number in of_item.values()),
            compared=len(same),
            agreement=proportion([hit for hit, _ in same], [item for _, item in same]) if same else None,
            annotators=tuple(sorted(annotators, key=lambda one: (-one.ranked, one.user))),
        )


def _item_id(prompt: Any) -> str:
    content = json.dumps(prompt, sort_keys=True)
    return f"item-{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def _ranked(user: str | ColumnElement[str]) -> ColumnElement[bool]:
    """Whether a user has ranked the row's item."""
    return exists().where(
        feedback.c.user_id == user,
        feedback.c.target == "group:" + label_items.c.group_id,
        feedback.c.slot == "comparison",
        feedback.c.current,
    )


def _in_hands() -> ColumnElement[bool]:
    return label_assignments.c.created > time.time() - _OPEN_SECONDS


def _taken() -> Any:
    """How many annotators have ranked the row's item or hold it."""
    return (
        select(func.count())
        .select_from(label_assignments)
        .where(label_assignments.c.item == label_items.c.id, ~label_assignments.c.skipped)
        .where(or_(_in_hands(), _ranked(label_assignments.c.user_id)))
        .correlate(label_items)
        .scalar_subquery()
    )


def _assign(connection: Connection, item: str, user: str) -> None:
    again = and_(label_assignments.c.item == item, label_assignments.c.user_id == user)
    now = time.time()
    if not connection.execute(update(label_assignments).where(again).values(created=now)).rowcount:
        row = {"item": item, "user_id": user, "created": now, "skipped": False}
        connection.execute(insert(label_assignments).values(**row))
