"""From text to packed batches: formats, chat templates, tokenising, packing, and a check of the data. Knows no model."""

from alignfast.data.check import DataReport, check_file
from alignfast.data.encode import PROMPT_FORMATS, encode_completions, encode_prompts
from alignfast.data.forest import Prepared, PrepareReport
from alignfast.data.formats import FORMATS, Rows, load_rows
from alignfast.data.packing import LAYOUTS, Batch, Tree, cut, mismatched, pack
from alignfast.data.sources import DataError, HubDataset
from alignfast.data.tokenize import (
    PREFERENCE_FORMATS,
    RANKING_FORMATS,
    SFT_FORMATS,
    THUMBS_FORMATS,
    prepare_preference,
    prepare_ranking,
    prepare_sft,
    prepare_thumbs,
)

__all__ = [
    "FORMATS",
    "LAYOUTS",
    "PREFERENCE_FORMATS",
    "PROMPT_FORMATS",
    "RANKING_FORMATS",
    "SFT_FORMATS",
    "THUMBS_FORMATS",
    "Batch",
    "DataError",
    "DataReport",
    "HubDataset",
    "PrepareReport",
    "Prepared",
    "Rows",
    "Tree",
    "check_file",
    "cut",
    "encode_completions",
    "encode_prompts",
    "load_rows",
    "mismatched",
    "pack",
    "prepare_preference",
    "prepare_ranking",
    "prepare_sft",
    "prepare_thumbs",
]
