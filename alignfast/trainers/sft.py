"""Supervised fine-tuning: the model learns to write the completions it is shown."""

from __future__ import annotations

from torch import Tensor

from alignfast.data import SFT_FORMATS, Batch, Prepared, Rows, Tree, prepare_sft
from alignfast.losses import SFT_STATS, sft_counts, sft_loss
from alignfast.trainers.batches import Counts, num_predictions
from alignfast.trainers.config import TrainerConfig, config
from alignfast.trainers.loop import Trainer
from alignfast.trainers.metrics import Metrics, means


@config
class SFTConfig(TrainerConfig):
    """Options of SFTTrainer."""

    learning_rate: float = 2e-5
    """AdamW's step size at its highest."""
    disable_dropout: bool = False
    """Set every dropout of the model to 0."""
    completion_only_loss: bool | None = None
    """Loss on completions alone. None: yes for prompt and completion, no for text and messages."""
    assistant_only_loss: bool = False
    """Loss on the assistant's turns of a conversation alone."""
    loss_type: str = "nll"
    """`nll`, or `dft` (arXiv 2508.05629), where a token counts as much as the model already expects it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choose("loss_type", "nll", "dft")


class SFTTrainer(Trainer):
    """Fine-tune on text, messages, or prompts with completions.

    >>> config = SFTConfig(output_dir="out", learning_rate=1e-4)
    >>> trainer = SFTTrainer("my-model", args=config, train_dataset="chats.jsonl")  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    >>> trainer.save_model("out/final")  # doctest: +SKIP
    """

    args: SFTConfig
    config_class = SFTConfig
    formats = SFT_FORMATS

    def prepare(self, rows: Rows) -> Prepared:
        """Trees of one answer each."""
        return prepare_sft(
            rows,
            self.processing_class,
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
            completion_only_loss=self.args.completion_only_loss,
            assistant_only_loss=self.args.assistant_only_loss,
        )

    def count(self, tree: Tree) -> Counts:
        """Tokens that carry loss."""
        return {"trained": sum(num_predictions(tree))}

    def compute_loss(self, batch: Batch, counts: Counts, router_weight: float) -> tuple[Tensor, Metrics]:
        """Mean negative log-likelihood over the step's tokens."""
        loss_fn = sft_loss(counts["trained"], loss_type=self.args.loss_type)
        loss, sums = self.policy(batch, loss_fn, stats=SFT_STATS, router_weight=router_weight)
        return loss, means(sums, sft_counts(counts["trained"]))
