"""How problems are solved: every backend maps a :class:`~pyro_sinkhorn.ot.problem.Problem` to its solution."""
