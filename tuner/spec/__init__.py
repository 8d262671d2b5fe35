"""What a study file says: the space, the budget, the data and the training, read and checked."""
