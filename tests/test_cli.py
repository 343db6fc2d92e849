"""The command line as a user meets it: each command end to end on tiny models, each error in one line with its code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from rollout.recorded import RecordedServer
from safetensors.torch import load_file
from trainers.tiny import make_llama, make_pairs, make_rows, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignfast.cli import COMMANDS, main
from alignfast.commands.recipes import RECIPES
from alignfast.trainers.metrics import read_metrics

QUICK = ["--report_to", "none", "--use_cpu", "--logging_steps", "1", "--per_device_train_batch_size", "4"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_llama(initializer_range=0.2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: str) -> str:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    adapted = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs_file(path: Path, number: int = 12) -> str:
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in make_pairs(number)]
    return write_rows(path / "pairs.jsonl", rows)


def fails(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """Run a command that must end in `code` with one clear line on standard error; returns what was said."""
    try:
        found = main(words)
    except SystemExit as leave:
        found = leave.code
    said = capsys.readouterr().err
    assert found == code, said
    assert "Traceback" not in said
    last = said.replace("\r", "\n").split("\nalignfast ")[-1]  # before it, bars of what was loaded
    assert "error: " in last
    return last.rstrip()


# Training


def test_dpo_from_a_config_with_a_flag_over_it(tmp_path: Path, model_dir: str) -> None:
    out, pairs = tmp_path / "run", pairs_file(tmp_path)
    config = {"model": model_dir, "train_dataset": pairs, "output_dir": str(out), "beta": 0.3, "max_steps": 9}
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(config))
    code = main(
        ["dpo", "--config", str(tmp_path / "dpo.yaml"), "--max_steps", "2", "--eval_dataset", pairs, *QUICK]
    )
    assert code == 0
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert (written["beta"], written["max_steps"], written["use_cpu"]) == (0.3, 2, True)
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert "eval_rewards/accuracies" in rows[-1]
    assert "<svg" in (out / "report.html").read_text()
    trained, before = (AutoModelForCausalLM.from_pretrained(name) for name in (out, model_dir))
    assert any(not torch.equal(p, q) for p, q in zip(trained.parameters(), before.parameters()))
    AutoTokenizer.from_pretrained(out)


def test_sft_with_trls_names_and_resume(tmp_path: Path, model_dir: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(12))
    run = tmp_path / "run"
    words = [
        "sft",
        "--model_name_or_path",
        model_dir,
        "--dataset_name",
        rows,
        *QUICK,
        "--output_dir",
        str(run),
    ]
    words += ["--max_steps", "4", "--save_steps", "2"]
    assert main(words) == 0
    whole = load_file(run / "model.safetensors")
    shutil.rmtree(run / "checkpoints" / "step-4")
    assert main([*words, "--resume"]) == 0
    resumed = load_file(run / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]
    assert not (run / "metrics.1.jsonl").exists()  # a run begun anew would have moved the first one's there


def test_a_finished_run_is_not_evaluated_again(tmp_path: Path, model_dir: str) -> None:
    """Its last evaluation came after its last checkpoint, and so did its samples and its figures."""
    run, rows = tmp_path / "run", write_rows(tmp_path / "rows.jsonl", make_rows(6))
    words = ["sft", "--model", model_dir, "--train_dataset", rows, "--eval_dataset", rows, *QUICK]
    words += ["--output_dir", str(run), "--max_steps", "2", "--save_steps", "2"]
    assert main(words) == 0
    before = [(run / name).read_text() for name in ("metrics.jsonl", "samples.jsonl")]
    assert before[0].count("eval_loss") == before[0].count("train_runtime") == 1
    assert main([*words, "--resume"]) == 0
    assert before == [(run / name).read_text() for name in ("metrics.jsonl", "samples.jsonl")]


def test_lora_trains_adapters_alone(tmp_path: Path, model_dir: str) -> None:
    out = tmp_path / "run"
    words = ["--model", model_dir, "--train_dataset", pairs_file(tmp_path), "--output_dir", str(out), *QUICK]
    lora = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "[q_proj,v_proj]"]
    assert main(["dpo", *words, *lora, "--max_steps", "1"]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert set(config["target_modules"]) == {"q_proj", "v_proj"}
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    "option", [("--lora_r", "8"), ("--use_dora",), ("--lora_target_modules", "all-linear")]
)
def test_adapters_that_are_described_but_not_asked_for_are_refused(
    option: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training all the weights in their place would be a surprise."""
    words = ["dpo", "--model", "never-loaded", "--train_dataset", pairs_file(tmp_path), *option]
    assert f"{option[0][2:]} is for adapters" in fails(capsys, 2, *words)


def test_samples_before_and_after(tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ["--model", model_dir, "--train_dataset", pairs_file(tmp_path), "--output_dir", str(out), *QUICK]
    words += ["--max_steps", "2", "--learning_rate", "0.05"]
    assert main(["dpo", *words, "--sample_prompts", "3"]) == 0
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 0, 0, 2, 2, 2]
    assert [row["prompt"] for row in rows[:3]] == [row["prompt"] for row in rows[3:]]
    assert [row["completion"] for row in rows[:3]] != [row["completion"] for row in rows[3:]]
    assert "step 2" in (out / "report.html").read_text()
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "the cat"}] * 4)
    words = ["sft", "--model", model_dir, "--train_dataset", texts, "--sample_prompts", "1", *QUICK]
    assert "rows with a prompt" in fails(capsys, 1, *words, "--output_dir", str(tmp_path / "other"))


def test_print_config_is_a_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["dpo", "--model", "somewhere", "--beta", "0.7", "--print_config"])
    assert leave.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"], printed["beta"], printed["lora_r"]) == ("somewhere", 0.7, 16)
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(printed))
    with pytest.raises(SystemExit) as leave:
        main(["dpo", "--config", str(tmp_path / "printed.yaml"), "--print_config"])
    assert leave.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out) == printed


# Looking


def test_eval_of_pairs_against_a_reference(tmp_path: Path, model_dir: str, adapter_dir: str) -> None:
    pairs, out = pairs_file(tmp_path), tmp_path / "eval.json"
    words = ["eval", "--dataset", pairs, "--use_cpu", "--output", str(out)]
    assert main([*words, "--model", adapter_dir]) == 0
    by_switch = json.loads(out.read_text())
    assert main([*words, "--model", adapter_dir, "--reference", model_dir, "--layout", "padded"]) == 0
    by_model = json.loads(out.read_text())
    assert by_switch["accuracy"] == by_model["accuracy"]
    assert by_switch["pairs"] == 12
    assert main([*words, "--model", model_dir]) == 0
    assert "implicit_reward" not in json.loads(out.read_text())["accuracy"]


def test_eval_of_texts_is_perplexity(
    tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(8))
    assert main(["eval", "--model", model_dir, "--dataset", rows, "--use_cpu"]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert "pairs" in fails(
        capsys, 1, "eval", "--model", model_dir, "--reference", model_dir, "--dataset", rows, "--use_cpu"
    )


def test_eval_puts_plain_rows_into_the_chat_template(
    tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--model", model_dir, "--dataset", pairs_file(tmp_path), "--use_cpu", "--chat"]
    assert "chat template" in fails(capsys, 1, *words)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + ' ' }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name, chat in (("plain", []), ("chat", ["--chat"])):
        words = ["eval", "--model", model_dir, "--tokenizer", str(tmp_path / "tokenizer"), "--use_cpu"]
        words += [
            "--dataset",
            str(tmp_path / "pairs.jsonl"),
            "--output",
            str(tmp_path / f"{name}.json"),
            *chat,
        ]
        assert main(words) == 0
    plain, chat = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "chat"))
    assert plain["pairs"] == chat["pairs"]
    assert plain["name"] == chat["name"]


def test_generate_writes_rows_that_training_reads(
    tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("the cat\n\nthe dog\n")
    out = tmp_path / "out.jsonl"
    words = ["generate", "--model", model_dir, "--max_new_tokens", "4", "--use_cpu"]
    assert (
        main([*words, "--prompts", str(tmp_path / "prompts.txt"), "--num_samples", "3", "--output", str(out)])
        == 0
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the cat"] * 3 + ["the dog"] * 3
    capsys.readouterr()
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "the cat"}, {"prompt": "the dog"}])
    assert main([*words, "--prompts", prompts, "--temperature", "0"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main([*words, "--prompt", "the cat", "--temperature", "0"]) == 0
    assert json.loads(capsys.readouterr().out) == printed[0]


def test_generate_refuses_rows_without_a_prompt(
    tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}, {"text": "b"}])
    assert "line 2" in fails(capsys, 1, "generate", "--model", model_dir, "--prompts", bad)
    assert "--prompt TEXT" in fails(capsys, 2, "generate", "--model", model_dir)


def test_generate_asks_a_server(tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer()
    server = RecordedServer(lambda text: tokenizer(text)["input_ids"])
    words = ["generate", "--model", model_dir, "--prompt", "the cat", "--max_new_tokens", "2"]
    assert main([*words, "--engine", "vllm", "--server_url", server.url]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "prompt": "the cat",
        "completion": tokenizer.decode([3, 4]),
    }
    server.close()
    assert "go together" in fails(capsys, 2, *words, "--engine", "vllm")
    assert "go together" in fails(capsys, 2, *words, "--server_url", server.url)


def test_merged_weights_give_the_adapters_logits(tmp_path: Path, model_dir: str, adapter_dir: str) -> None:
    assert main(["merge", adapter_dir, str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted, base = (AutoModelForCausalLM.from_pretrained(name) for name in (adapter_dir, model_dir))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        logits, expected, without = (model(ids).logits for model in (merged, adapted, base))
    assert type(merged).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (without - expected).abs().max() > 0.01
    AutoTokenizer.from_pretrained(tmp_path / "merged")


def test_merge_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_dir: str
) -> None:
    assert "adapter_config.json" in fails(capsys, 1, "merge", model_dir, str(tmp_path / "merged"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_init_writes_a_recipe_that_parses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", recipe]) == 0
    assert f"{recipe}.yaml" in capsys.readouterr().out
    with pytest.raises(SystemExit) as leave:
        main([recipe.split("_")[0], "--config", f"{recipe}.yaml", "--print_config"])
    assert leave.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"] == (None if recipe == "online" else "YOUR_MODEL")
    assert printed.get("use_peft", False) == (recipe == "dpo_lora")
    assert "there already" in fails(capsys, 1, "init", recipe)
    assert main(["init", recipe, "--force"]) == 0


def test_data_check_prints_and_fails_on_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", pairs_file(tmp_path)]) == 0
    assert "12 rows" in capsys.readouterr().out
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": "the cat"}, {"text": ""}])
    assert "can't be used: 1" in fails(capsys, 1, "data", "check", bad)
    assert "check FILE" in fails(capsys, 2, "data", "look", bad)


def test_doctor_tells_of_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--as_json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ops"]["token_logps"]["torch"] == "available"
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] or found["packages"]["torch"]
    assert main(["doctor"]) == 0
    assert "token_logps" in capsys.readouterr().out


# Errors


def test_the_nearest_name_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "'learning_rate'" in fails(capsys, 2, "dpo", "--learning_rat", "1")
    (tmp_path / "typo.yaml").write_text("lerning_rate: 1.0e-5\n")
    assert "'learning_rate'" in fails(capsys, 2, "sft", "--config", str(tmp_path / "typo.yaml"))
    assert "'dpo'" in fails(capsys, 2, "dop")
    assert "layout" in fails(capsys, 2, "sft", "--packing", "true")  # TRL's: refused with the reason


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["dpo"], 2, "--model"),
        (["dpo", "--model", "a", "--model_name_or_path", "b"], 2, "same option"),
        (["dpo", "--model", "a", "--train_dataset", "no.jsonl"], 1, "no such file"),
        (["dpo", "--max_steps", "many"], 2, "max_steps"),
        (["dpo", "--beta", "-1", "--model", "a", "--train_dataset", "b"], 1, "beta"),
        (["dpo", "--config", "no.yaml"], 2, "no.yaml"),
        (["report", "nowhere"], 1, "metrics.jsonl"),
        (["doctor", "nowhere"], 1, "metrics.jsonl"),
        (["init", "grop"], 2, "dpo_lora"),
        (["quickstart", "--seeds", "0"], 1, "seeds"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, part: str
) -> None:
    said = fails(capsys, code, *words)
    assert part in said
    assert len(said.splitlines()) <= (2 if code == 2 else 1)


def test_a_run_without_numbers_ends_with_an_error(
    tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--model",
        model_dir,
        "--train_dataset",
        pairs_file(tmp_path),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    said = fails(capsys, 1, "dpo", *words, *QUICK, "--max_steps", "9", "--learning_rate", "1e30")
    assert "3 steps in a row gave no number" in said


def test_options_in_the_readme_exist() -> None:
    """Every `alignfast COMMAND ... --option` that README shows."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    shown = re.findall(r"^alignfast (\w+) ([^#\n]*--[^#\n]*)", readme, re.MULTILINE)
    assert shown
    for command, rest in shown:
        help_text = subprocess.run(
            [sys.executable, "-m", "alignfast", command, "--help"], capture_output=True, text=True
        ).stdout
        for option in re.findall(r"--\w+", rest):
            assert option in help_text, f"alignfast {command} has no {option}"


def test_debug_shows_where_it_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "nowhere", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        raise KeyError("bug")

    monkeypatch.setattr("alignfast.findings.read_run", broken)
    with pytest.raises(KeyError):
        main(["doctor", str(tmp_path)])


def test_bad_data_is_named(tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": "b", "rejected": ""}])
    said = fails(
        capsys, 1, "dpo", "--model", model_dir, "--train_dataset", bad, "--output_dir", str(tmp_path / "r")
    )
    assert "line 1" in said


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from alignfast.cli import main; rc = main(['--help']); "
        "sys.exit(rc or 'torch' in sys.modules or 'jsonargparse' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "alignfast", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.startswith("alignfast ")) == (0, True)
