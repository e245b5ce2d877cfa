"""Scripts, as in ``python -m examples.own_criterion``: on a tiny random model, or with ``--demo`` on a real one."""
