"""The Siamese network on MNIST: ten digits in the plane (Hadsell, Chopra and LeCun 2006)."""
