"""A tiny run that is long enough to be killed at many different moments."""

TINY = {
    "name": "tiny",
    "data": {"source": "scenes", "image_size": 16, "scenes": {"train": 12, "val": 6, "test": 6, "size": 16}},
    "model": {
        "image": {"name": "convnet", "weights": "random", "widths": [8, 8], "groups": 4, "projection": "linear"},
        "text": {"name": "hashing", "width": 32, "projection": "block"},
        "width": 16,
    },
    "experts": {
        "num": 2,
        "epochs": 12,
        "batch": 16,
        "augment": {"crop": True, "flip": 0.5, "randaugment_ops": 2},
    },
    "distill": {
        "budget": 14,
        "phases": [
            {"pairs": 6, "start": 0, "stop": 1, "endpoint": 2, "iterations": 8},
            {"pairs": 7, "start": 1, "stop": 2, "endpoint": 3, "iterations": 60},
        ],
        "batch": 3,
        "steps": 2,
        "inner_lr": 0.01,
        "lr_lr": 1e-5,
        "lr_image": 1.0,
        "lr_text": 1.0,
        "lr_similarity": 0.1,
        "checkpoint_every": 2,
        "snapshots": 2,
    },
    "evaluate": {
        "epochs": 1,
        "students": 2,
        "baseline_lrs": [0.1],
        "baseline_losses": ["infonce"],
        "baseline_draws": 2,
    },
}
