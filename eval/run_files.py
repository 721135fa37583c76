"""Names of the files in the folder of a run, for those who write them and those who read them."""

ROWS, CONFIG, MACHINE = "rows.jsonl", "config.json", "machine.json"
# Rows of a run that is kept (see `eval.report.files.pack`).
PACKED = "rows.jsonl.xz"
