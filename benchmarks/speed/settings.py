"""Settings of the trainings, as tune.py found them; README.md says how and with how many runs for each method."""

TRAINING = {
    "gpt": {"batch_size": 4, "context": 64, "steps": 200, "warmup": 20, "decay": "cosine"},
    "gpt_small": {"batch_size": 4, "context": 64, "steps": 300, "warmup": 20, "decay": "cosine"},
    "cnn": {"batch_size": 64, "context": 0, "steps": 300, "warmup": 20, "decay": "cosine"},
}
TUNED = {
    "gpt": {
        "adamw_fused": {"lr": 1e-3},
        "muon": {"lr": 0.02, "rest": {"lr": 3e-3}},
        "sisa": {"penalty": 1.0, "preconditioner_scale": 10000.0},
        "nsisa": {
            "penalty": 35.0,
            "rest": {"penalty": 0.3, "preconditioner_scale": 100.0},
        },
    },
    "cnn": {
        "adamw_fused": {"lr": 0.01},
        "muon": {"lr": 0.05, "rest": {"lr": 1e-3}},
        "sisa": {"penalty": 1.0, "preconditioner_scale": 1000.0},
        "nsisa": {"penalty": 50.0, "rest": {"penalty": 1.0, "preconditioner_scale": 300.0}},
    },
}
LINK_TARGET = 2.6
