"""Twenty prompts of different kinds, for comparing greedy answers."""

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a little girl who",
    "def fibonacci(n):\n    ",
    "The three laws of motion are",
    "Q: What is 12 times 12?\nA:",
    "Water boils at a temperature of",
    "Dear Sir or Madam,\n\nI am writing to",
    "The quick brown fox",
    "Photosynthesis is the process by which",
    "In 1969, the first humans",
    "To make an omelette, first",
    "import numpy as np\n\nx = np.",
    "Le chat est assis sur",
    "The meaning of the word 'serendipity' is",
    "1, 1, 2, 3, 5, 8, 13,",
    "<html>\n<head>\n<title>",
    "My favourite season is autumn because",
    "The mitochondria is",
    "A haiku about the sea:\n",
    "Warning: this product contains",
)
