"""Image similarity on Imagenette: do two photographs show the same kind of thing?"""
