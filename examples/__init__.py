"""Two small models that run their attention through HAL, and a demo that checks both."""
