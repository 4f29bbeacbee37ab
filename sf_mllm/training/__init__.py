"""Both training stages: `transformers.Trainer` with losses and data of ours."""
