"""A world with exact answers: data from a mixture of Gaussians, with velocity and score in closed form. No training.

For a single Gaussian every step of every sampler is affine in x, so the mean and covariance of the whole chain follow
by matrix algebra, without a sample: whether a sampler preserves the marginals becomes an exact calculation.
"""

import torch


class GaussianMixture:
    """Data x0 ~ Σ_j weights[j]·N(means[j], covs[j]) in d dimensions, float64, and its flow by Eq. 2."""

    def __init__(self, weights, means, covs):
        self.weights = torch.as_tensor(weights, dtype=torch.float64)  # [J]
        self.means = torch.as_tensor(means, dtype=torch.float64)  # [J, d]
        self.covs = torch.as_tensor(covs, dtype=torch.float64)  # [J, d, d]

    def sample(self, count, generator):
        """True samples of the data, [count, d]."""
        j = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[j] + torch.einsum("bde,be->bd", torch.linalg.cholesky(self.covs)[j], z)

    def marginal(self, sigma):
        """Mean [J, d] and covariance [J, d, d] of each component of p_sigma."""
        eye = torch.eye(self.means.shape[1], dtype=torch.float64)
        return (1 - sigma) * self.means, (1 - sigma) ** 2 * self.covs + sigma**2 * eye

    def log_density(self, x, sigma):
        """log p_sigma(x), x [B, d] -> [B]. Independent of `velocity`: tests differentiate it to check the score."""
        components = torch.distributions.MultivariateNormal(*self.marginal(sigma))
        return torch.logsumexp(self.weights.log() + components.log_prob(x[:, None]), dim=1)

    def velocity(self, x, sigma):
        """Eq. 3 in expectation:  v = E[z − x0 | x_sigma = x], the perfect flow model.

        x [B, d], sigma a number -> [B, d].
        """
        mean, cov = self.marginal(sigma)
        offset = x[:, None] - mean
        whitened = torch.linalg.solve(cov, offset.permute(1, 2, 0)).permute(2, 0, 1)  # [B, J, d], S⁻¹(x − mean)
        noise = sigma * whitened  # E[z | x, j]
        data = self.means + (1 - sigma) * torch.einsum("jde,bje->bjd", self.covs, whitened)  # E[x0 | x, j]
        joint = self.weights.log() - (offset * whitened).sum(2) / 2 - torch.linalg.slogdet(cov).logabsdet / 2
        posterior = joint.softmax(1)  # [B, J], P(j | x)
        return torch.einsum("bj,bjd->bd", posterior, noise - data)


def gaussian(mean, cov):
    """A single Gaussian as a mixture of one."""
    return GaussianMixture([1.0], torch.as_tensor(mean)[None], torch.as_tensor(cov)[None])


def propagate(sde, world):
    """Mean and covariance of the chain's state at every sigma, exactly, for a world of ONE Gaussian; start N(0, I).

    There the perfect velocity is affine, v(x) = W·x + w, so a step x' = a·x + b·v(x) + Σ·ξ has
    mean' = A·mean + b·w and cov' = A·cov·Aᵀ + Σ²·I with A = a·I + b·W.
    Returns ([T + 1, d], [T + 1, d, d]).
    """
    d = world.means.shape[1]
    eye = torch.eye(d, dtype=torch.float64)
    probe = torch.cat([torch.zeros(1, d, dtype=torch.float64), eye])  # 0 and the unit vectors: v there gives w and W
    mean, cov = torch.zeros(d, dtype=torch.float64), eye
    means, covs = [mean], [cov]
    for k in range(sde.num_steps):
        velocities = world.velocity(probe, sde.sigmas[k].item())
        w, W = velocities[0], (velocities[1:] - velocities[0]).T
        A = sde.a[k] * eye + sde.b[k] * W
        mean = A @ mean + sde.b[k] * w
        cov = A @ cov @ A.T + sde.variance[k] * eye
        means.append(mean)
        covs.append(cov)
    return torch.stack(means), torch.stack(covs)
