"""What runs inside a rank: data, model, loop, checkpoints. Start at `service.training.loop.train`."""
