"""PyTorch networks: the SiT predictor, the one-block refiner, checkpoint and VAE loading."""
