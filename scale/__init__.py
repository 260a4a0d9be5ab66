"""Virtual-cell models: train, apply and judge them."""
