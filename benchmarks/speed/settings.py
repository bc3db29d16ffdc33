"""Settings of the trainings: found by tune.py with equal effort for every method, see the table in README.md."""

TRAINING = {
    "gpt": {"batch_size": 4, "context": 64, "steps": 200, "warmup": 20, "decay": "cosine"},
    "gpt_small": {"batch_size": 4, "context": 64, "steps": 300, "warmup": 20, "decay": "cosine"},
    "cnn": {"batch_size": 64, "context": 0, "steps": 300, "warmup": 20, "decay": "cosine"},
}
TUNED = {
    "gpt": {
        "adamw_fused": {"lr": 1e-3},
        "muon": {"lr": 0.02, "rest": {"lr": 1e-3}},
        "sisa": {"penalty": 0.3, "preconditioner_scale": 3000.0},
        "nsisa": {
            "penalty": 35.0,
            "preconditioner_scale": 1.0,
            "momentum": 0.95,
            "rest": {"penalty": 0.3, "preconditioner_scale": 100.0},
        },
    },
    "cnn": {
        "adamw_fused": {"lr": 1e-3},
        "muon": {"lr": 0.02, "rest": {"lr": 1e-3}},
        "sisa": {"penalty": 10.0, "preconditioner_scale": 100.0},
        "nsisa": {"penalty": 50.0, "preconditioner_scale": 1.0, "momentum": 0.95, "rest": {"penalty": 10.0}},
    },
}
LINK_TARGET = 2.2
