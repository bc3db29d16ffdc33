"""Settings of the trainings, as tune.py found them; README.md says how and with how many runs for each method."""

TRAINING = {
    "gpt": {"batch_size": 4, "context": 64, "steps": 200, "warmup": 20, "decay": "cosine"},
    "gpt_small": {"batch_size": 4, "context": 64, "steps": 300, "warmup": 20, "decay": "cosine"},
    "cnn": {"batch_size": 64, "context": 0, "steps": 300, "warmup": 20, "decay": "cosine"},
}
LINK_TARGET = 2.6
# What tune.py changes in a training: the GPT's settings are chosen by the number of steps to that training loss.
TUNING = {"gpt": {"target": LINK_TARGET, "at_most": 115}, "gpt_small": {}, "cnn": {}}
TUNED = {
    "gpt": {
        "adamw_fused": {"lr": 5e-4},
        "muon": {"lr": 0.02, "rest": {"lr": 3e-3}},
        "sisa": {"penalty": 1.0, "preconditioner_scale": 10000.0},
        "nsisa": {"penalty": 100.0, "rest": {"penalty": 3.0, "preconditioner_scale": 10000.0}},
    },
    "cnn": {
        "adamw_fused": {"lr": 0.01},
        "muon": {"lr": 0.05, "rest": {"lr": 1e-3}},
        "sisa": {"penalty": 1.0, "preconditioner_scale": 1000.0},
        "nsisa": {"penalty": 50.0, "rest": {"penalty": 1.0, "preconditioner_scale": 300.0}},
    },
}
