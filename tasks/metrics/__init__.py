"""Official metrics: each a function of the answers and of the rows that they answer, which gives a `Score`."""
