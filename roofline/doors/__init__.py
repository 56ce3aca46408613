"""What the Python doors share: results, requests with their text, and the loaded model behind."""
