"""The stages of a run, in order. Apart from the pipeline, so that naming them needs no torch."""

STAGES = ("train", "prune", "finetune", "export", "convert", "bench", "report", "gate")
