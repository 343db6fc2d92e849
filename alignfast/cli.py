"""The command line: `alignfast COMMAND ...`. Each command is a module of `alignfast.commands`, loaded when it is named.

Exit codes: 0 done; 1 the data, the model or the machine stood in the way, told in one line; 2 the command line was
wrong; 75 a signal stopped training after its checkpoint was written.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import alignfast

# Command, its module, and what it does.
COMMANDS = {
    "quickstart": ("quickstart", "make, fine-tune and align a small model in minutes, without a download"),
    "init": ("init", "write a recipe to start from"),
    "data": ("data", "check a file of data: alignfast data check FILE"),
    "sft": ("train", "fine-tune on texts, conversations, or prompts with completions"),
    "reward": ("train", "train a reward model on pairs or rankings"),
    "dpo": ("train", "align on pairs of a chosen and a rejected answer"),
    "kto": ("train", "align on single answers with a thumb up or down"),
    "grpo": ("train", "align on rewards of the model's own answers, compared in groups"),
    "ppo": ("train", "align on rewards of the model's own answers, with a critic"),
    "eval": ("evaluate", "preference accuracy, reward accuracy or perplexity of a model on a file"),
    "generate": ("generate", "complete prompts"),
    "serve": ("serve", "answer over HTTP, as OpenAI's API does, and take votes on the answers"),
    "online": ("online", "learn from votes on a server's answers; also: status, promote, rollback"),
    "merge": ("merge", "add LoRA adapters into the weights of their model"),
    "feedback": ("feedback", "votes of people: export, import, stats, expire, delete-user"),
    "keys": ("keys", "API keys of the server: make, list, revoke"),
    "report": ("report", "one HTML page of a run"),
    "bench": ("bench", "the ops of training and sampling beside their peers: tables and plots"),
    "doctor": ("doctor", "health of the installation, or of a run"),
}
USAGE, USER_ERROR = 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else USAGE
    if words[0] in ("-V", "--version"):
        print(f"alignfast {alignfast.__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"alignfast: error: {_unknown(words[0])}", file=sys.stderr)
        return USAGE
    module = import_module(f"alignfast.commands.{COMMANDS[words[0]][0]}")
    from alignfast.commands.parser import UsageError

    try:
        module.run(words[0], words[1:])
    except UsageError as error:
        print(
            f"alignfast {words[0]}: error: {error}\n`alignfast {words[0]} --help` lists the options",
            file=sys.stderr,
        )
        return USAGE
    except (ValueError, RuntimeError, OSError) as error:
        if debug:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"alignfast {words[0]}: error: {message}", file=sys.stderr)
        if not debug and isinstance(error, RuntimeError):  # it may be a fault of ours, or of a library's
            print("`--debug` before or after the command shows where it came from", file=sys.stderr)
        return USER_ERROR
    return 0


def _help() -> str:
    lines = [f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: alignfast COMMAND [options]",
            "",
            "Fast, exact trainers and kernels for aligning language models.",
            "",
            *lines,
            "",
            "`alignfast COMMAND --help` lists a command's options; `--debug` shows where an error came from.",
        ]
    )


def _unknown(command: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(command, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
    return f"there is no command {command!r}; {hint}"


if __name__ == "__main__":
    sys.exit(main())
