"""The learner: from votes to the next version of the policy, or to the reasons why there is none.

One file a room:
    config.py      the options
    loop.py        the stages in order, and going on after a kill
    round.py       what a round knows, as the store keeps it
    votes.py       which votes a round learns from, and which are held out
    reward.py      the reward model's update          policy.py      the policy's: grpo, ppo, dpo, kto
    logged.py      answers of older versions in a GRPO draw
    budget.py      the KL that a round may spend
    evaluate.py    figures of a candidate             serve.py       canary, promotion, watch
    folders.py     versions as immutable folders
"""

from alignfast.online.loop.config import OnlineConfig
from alignfast.online.loop.loop import OnlineLoop
from alignfast.online.loop.round import STAGES, Round

__all__ = ["STAGES", "OnlineConfig", "OnlineLoop", "Round"]
