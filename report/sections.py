"""SECTIONS of a report: how the records of each program are recognised, read and shown."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from report.aggregation import aggregation_result, read_aggregation, show_aggregation
from report.attention import attention_result, read_attention, show_attention
from report.facts import RunReport
from report.probes import bank_result, read_bank, show_banks
from report.runs import Kind, Run
from report.training import read_training, show_trainings, training_result


class Section(NamedTuple):
    """`read`, `result` and `show` raise a KeyError, TypeError, ... for a damaged record."""

    title: str
    kind: Kind
    read: Callable[[Run], Any]
    result: Callable[[Any], str]  # what was read, in a few words
    show: Callable[[Sequence[RunReport]], list[object]]  # blocks of report.page


PROBES = Kind("cls_features", "results.json")
ATTENTION = Kind("reduction", "attention.json", trains=False, several=True)
AGGREGATION = Kind("kl_direction", "aggregation.json", trains=False)
FINETUNING = Kind("layer_decay", "results.json")
PRETRAINING = Kind("mask_ratio", "results.json")
SECTIONS = {  # by program; a new kind of run is one entry
    "main_linprobe": Section("Linear probes", PROBES, read_bank, bank_result, show_banks),
    "main_analyze_attention": Section("Attention flow", ATTENTION, read_attention, attention_result, show_attention),
    "main_analyze_aggregation": Section(
        "Aggregation", AGGREGATION, read_aggregation, aggregation_result, show_aggregation
    ),
    "main_finetune": Section("Fine-tuning", FINETUNING, read_training, training_result, show_trainings),
    "main_pretrain": Section("Pretraining", PRETRAINING, read_training, training_result, show_trainings),
}
