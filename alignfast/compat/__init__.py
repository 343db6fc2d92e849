"""The names that people import from other libraries, with the same meaning on alignfast's kernels.

`trl`, `torch`, `verl`, `openrlhf` and `liger` hold what their libraries call so, and import none of them; docs/drop-ins.md
says what each maps to and where a default differs. `patch` makes TRL's own trainers use the kernels.
"""
