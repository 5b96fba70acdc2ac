"""Training in fixed point, with nearest and with stochastic rounding."""
