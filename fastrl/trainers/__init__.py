"""One page per stage: supervised fine-tuning, reward models, PPO."""
