"""Networks from everywhere, on which the engines are compared with the definition."""
