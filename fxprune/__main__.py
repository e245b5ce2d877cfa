"""``python -m fxprune``, and under ``torchrun`` a process of several."""

from fxprune.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
