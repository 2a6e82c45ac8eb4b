"""How Quire's demo model is made: its text, its training, its judges. scripts/train_demo_model.py runs them."""
