"""A teacher for EfficientAD out of a timm backbone."""
