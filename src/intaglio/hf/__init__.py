"""Where Intaglio meets the Hugging Face stack."""
