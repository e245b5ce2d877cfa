"""The suite of passes, installed as ``fxprune.passes``. The folders are the stages."""
