"""The micro nets, one family a file; `tests.support.micro` puts them into one table."""
