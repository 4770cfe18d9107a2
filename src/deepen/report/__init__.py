"""One self-contained HTML page about stages and training runs. Free of torch."""
