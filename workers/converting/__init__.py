"""A trained model -> what serves: a graph, a plan, compared with the model."""
