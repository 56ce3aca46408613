"""Weight formats: how floats become integers and back."""
