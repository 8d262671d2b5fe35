"""Everything that needs TensorFlow: the network, its training, its predictions."""
