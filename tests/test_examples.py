"""Each example runs as it stands, in a folder of its own, on a tiny model and a few rows."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from trainers.tiny import (
    WORDS,
    make_llama,
    make_pairs,
    make_reward_llama,
    make_rows,
    make_thumbs,
    make_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignfast.cli import main
from alignfast.commands.recipes import RECIPES
from alignfast.models import is_reward_model
from alignfast.online.feedback import Shown, Vote
from alignfast.online.server.versions import first_version
from alignfast.online.store import Store
from alignfast.trainers.metrics import read_metrics

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_llama().save_pretrained(tmp_path / "model")
    make_reward_llama(num_labels=2).save_pretrained(tmp_path / "judges")
    for name in ("model", "judges"):
        make_tokenizer().save_pretrained(tmp_path / name)
    pairs = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in make_pairs(16)]
    tasks = [{"prompt": row["prompt"], "answer": "the"} for row in make_rows(16)]
    for name, rows in (
        ("pairs", pairs),
        ("texts", make_rows(16)),
        ("thumbs", make_thumbs(16)),
        ("tasks", tasks),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "online"])
def test_recipes(recipe: str, workplace: Path) -> None:
    method = recipe.split("_")[0]
    data = {"sft": "texts.jsonl", "kto": "thumbs.jsonl", "grpo": "tasks.jsonl", "ppo": "tasks.jsonl"}.get(
        method, "pairs.jsonl"
    )
    words = [
        method,
        "--config",
        str(EXAMPLES / f"{recipe}.yaml"),
        "--model",
        "model",
        "--train_dataset",
        data,
    ]
    if method in ("grpo", "ppo"):
        words += [
            "--reward_funcs",
            "exact",
            "--max_completion_length",
            "8",
            "--gradient_accumulation_steps",
            "1",
            *("--eval_dataset", data, "--judge", "exact", "--gold_reward_funcs", "format"),
        ]
    if method == "ppo":
        words += ["--steps_per_generation", "2", "--reward_funcs", "judges", "--disagreement_coef", "0.5"]
    assert main([*words, "--max_steps", "2", "--use_cpu"]) == 0
    output = workplace / yaml.safe_load(RECIPES[recipe])["output_dir"]
    assert (output / "report.html").is_file()
    assert (output / "adapter_config.json").is_file() == (recipe == "dpo_lora")
    assert is_reward_model(str(output)) == (recipe == "reward")
    assert (output / "critic" / "model.safetensors").is_file() == (recipe == "ppo")
    if method == "ppo":
        assert read_metrics(output / "metrics.jsonl")[0]["rewards/judges/disagreement"] > 0
    if method == "grpo":
        evaluated = [row for row in read_metrics(output / "metrics.jsonl") if "eval_win_rate" in row]
        assert "eval_gold/rewards/format/mean" in evaluated[-1]
        drawn = (output / "samples.jsonl").read_text().splitlines()
        assert any("rewards" in json.loads(line) for line in drawn)


def test_the_online_recipe(workplace: Path) -> None:
    """As it stands, beside the server's database, a learner makes a version of votes or says why not."""
    with Store.open("sqlite:///feedback.db") as store:
        first_version(store, "model")
        for number in range(12):
            a, b = f"a{number}", f"b{number}"
            pair = [
                Shown(id=id, prompt=f"the cat {WORDS[number]}", text=text, group_id=f"g{number}", user="ann", policy_version="model")
                for id, text in ((a, "sat down"), (b, "ran"))
            ]  # fmt: skip
            store.record_shown(*pair)
            store.add_vote(Vote(response_id=a, kind="pair", value=a, among=(a, b), user="ann"))
            store.add_vote(Vote(response_id=b, kind="thumb", value="down", user="ann"))
        assert main(["online", "--config", str(EXAMPLES / "online.yaml"), "--once"]) == 0
        (run,) = store.runs.all()
        assert run.status == "done"
        made = store.versions.get("policy-1")
    assert made.status in ("promoted", "refused")
    assert Path(made.path).parent == workplace / "versions"


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_what_init_writes(recipe: str) -> None:
    assert (EXAMPLES / f"{recipe}.yaml").read_text() == RECIPES[recipe]


def test_dpo_script(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = EXAMPLES / "dpo.py"
    assert len(script.read_text().splitlines()) <= 12
    monkeypatch.setattr(sys, "argv", ["dpo.py", "model", "pairs.jsonl"])
    runpy.run_path(str(script), run_name="__main__")
    AutoModelForCausalLM.from_pretrained(workplace / "dpo_output" / "final")


def test_textbook_script(workplace: Path) -> None:
    found = runpy.run_path(str(EXAMPLES / "textbook.py"), run_name="__main__")
    saved = AutoModelForCausalLM.from_pretrained(workplace / "fine-tuned-model")
    assert saved.config.model_type == "gpt2"
    assert found["trainer"].state.global_step == 3  # 3 epochs of one batch


def test_arithmetic_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sum comes twice, every demonstration is right, and docs/real-run-rl.md's configs train on them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["arithmetic.py", "arithmetic"])
    runpy.run_path(str(EXAMPLES / "arithmetic.py"), run_name="__main__")
    held_out, tasks, shown = (
        [json.loads(line) for line in Path(f"arithmetic/{name}.jsonl").read_text().splitlines()]
        for name in ("held_out", "tasks", "demonstrations")
    )
    prompts = [row["prompt"] for row in (*held_out, *tasks, *shown)]
    assert len(held_out) == 500
    assert len(set(prompts)) == len(prompts)
    assert all(eval(row["prompt"].rstrip("= ")) == int(row["completion"]) for row in shown)
    tokenizer = AutoTokenizer.from_pretrained("arithmetic/model")
    text = shown[0]["prompt"] + shown[0]["completion"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    configs = EXAMPLES.parent / "docs" / "real-run-rl"
    words = ["--max_steps", "1", "--per_device_train_batch_size", "32", "--use_cpu"]
    assert main(["sft", "--config", str(configs / "sft.yaml"), *words]) == 0
    assert main(["grpo", "--config", str(configs / "grpo.yaml"), *words]) == 0
    assert Path("grpo_arithmetic/model.safetensors").is_file()


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml")} == {
        "arithmetic.py", "dpo.py", "textbook.py", *(f"{recipe}.yaml" for recipe in RECIPES),
    }  # fmt: skip
