"""From text to packed batches: formats, chat templates, tokenising, packing, and a check of the data. Knows no model."""

from alignfast.data.check import DataReport, check_file
from alignfast.data.formats import FORMATS, Rows, load_rows
from alignfast.data.packing import LAYOUTS, Batch, Tree, cut, pack
from alignfast.data.sources import DataError, HubDataset
from alignfast.data.tokenize import (
    PREFERENCE_FORMATS,
    SFT_FORMATS,
    Prepared,
    PrepareReport,
    encode_completions,
    prepare_preference,
    prepare_sft,
)

__all__ = [
    "FORMATS",
    "LAYOUTS",
    "PREFERENCE_FORMATS",
    "SFT_FORMATS",
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
    "load_rows",
    "pack",
    "prepare_preference",
    "prepare_sft",
]
