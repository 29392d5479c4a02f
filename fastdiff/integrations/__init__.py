"""Other libraries' models as ours."""
