"""A slow, plain twin of the whole step, written from the equations with dense Hessians.

One upper tensor u, one lower tensor v, losses as functions f(u, v) and g(u, v). Nothing here is
shared with the package: derivatives come from torch.func.hessian and jacrev, Adam from its paper.
"""

import itertools
import math

import torch
from torch.func import grad, hessian, jacrev


class Adam:
    def __init__(self, lr, betas=(0.9, 0.999), eps=1e-8):
        self.lr, self.betas, self.eps, self.t, self.m, self.s = lr, betas, eps, 0, 0.0, 0.0

    def __call__(self, x, d):
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * d
        self.s = b2 * self.s + (1 - b2) * d * d
        return x - self.lr * (self.m / (1 - b1**self.t)) / (
            (self.s / (1 - b2**self.t)).sqrt() + self.eps
        )


def derivatives(f, g, u, v):
    """f, g, f_u, f_v, r, H, J at one point."""
    r = grad(g, 1)(u, v)
    H = hessian(g, 1)(u, v)
    J = jacrev(grad(g, 1), 0)(u, v).T  # n_u x n_v
    return f(u, v), g(u, v), grad(f, 0)(u, v), grad(f, 1)(u, v), r, H, J


def exact_hypergradient(f, g, u, v):
    """f_u - J H^-1 f_v at (u, v), and the adjoint."""
    _, _, f_u, f_v, _, H, J = derivatives(f, g, u, v)
    q = -torch.linalg.solve(H, f_v)
    return f_u + J @ q, q


class LeastSquaresTwin:
    derivatives, least_curvature = staticmethod(derivatives), 0.0

    def __init__(self, f, g, u, v, lr, lower_steps=1, damping=1.0, share=0.3, ridge=0.0):
        self.f, self.g, self.u, self.v = f, g, u.clone(), v.clone()
        self.upper, self.lower = Adam(lr), Adam(lr)
        self.T, self.damping, self.share, self.ridge = lower_steps, damping, share, ridge
        self.nu, self.k, self.L, self.p = torch.zeros_like(v), 0, 0.0, None
        self.R = self.A = self.S = self.w = self.C = self.N = self.kappa = 0.0
        self.probed = self.D = self.held = 0.0
        self.missed = self.at_stake = 0.3
        self.past, self.gains, self.idle, self.told = [], [], 0, None

    def step(self):
        for _ in range(self.T):
            self.value, _, f_u, f_v, r, H, J = self.derivatives(self.f, self.g, self.u, self.v)
            Hnu = H @ self.nu
            a = f_v + Hnu
            seen = float(Hnu.norm() / self.nu.norm()) if self.nu.norm() > 0 else 0.0
            short = self.probed < 0.1 * self.L
            if self.k < 10 or self.k % 20 == 0 or short:
                if self.k == 0:
                    self.p = r / r.norm() + f_v / f_v.norm()
                self.p = H @ (self.p / self.p.norm())  # nowhere zero in the tests
                self.probed = float(self.p.norm())
                seen = max(seen, self.probed)
            self.L = max((0.99 if short else 0.999) * self.L, seen, self.least_curvature)
            self.R = 0.99 * self.R + 0.01 * float(r @ r)
            self.A = 0.99 * self.A + 0.01 * float(a @ a)
            self.S = 0.99 * self.S + 0.01 * float(f_v @ f_v)
            left = 1 - 1 / (self.k + 1)
            self.D = max(math.sqrt(self.R) / self.L, left * self.D)
            self.held = max(math.sqrt(self.S), (1 - 1 / (self.k + 101)) * self.held)
            now = math.hypot(a.norm(), f_v.norm())
            slope = max(self.held, math.sqrt(self.A + self.S), now)
            self.w = self.share * self.L * self.D / slope
            self.v = self.lower(self.v, self.damping * r + self.w * a)
            self.upper_grad = f_u + J @ self.nu  # at the point and with the nu of this evaluation
            self.certificate, self.residual = a.norm(), r.norm()
            self.reach = max(0.0, 1 - float(a.norm() / f_v.norm())) * 0.75
            self.C = 0.9 * self.C + 0.1 * float(self.nu @ Hnu)
            self.N = 0.9 * self.N + 0.1 * float(self.nu @ self.nu)
            self.kappa = max(0.99 * self.kappa, -self.C / self.N if self.N > 0 else 0.0)
            mu = self.ridge * self.L + 2 * self.kappa
            self.nu = self.moved(Hnu + mu * self.nu, a + mu * self.nu, self.L + mu)
            self.k += 1
        self.u = self.upper(self.u, self.upper_grad)

    def moved(self, Hnu, a, L):
        """Least energy and least residual, mixed, in the span V of the last three nu, from images
        remembered under today's mu."""
        if self.idle >= 20 and self.k % 100 < 90:
            self.idle, self.told, self.past = self.idle + 1, None, []
            return self.nu - a / L
        mu = self.ridge * self.L + 2 * self.kappa
        image = Hnu - mu * self.nu
        self.past = [(self.nu, image), *self.past][:4]
        points = [p for p, _ in self.past]
        images = [w + mu * p for p, w in self.past]
        B = torch.stack([points[0], *(p - q for p, q in itertools.pairwise(points[:3]))], 1)
        W = torch.stack([images[0], *(p - q for p, q in itertools.pairwise(images[:3]))], 1)
        if self.told:  # what was foretold of the span of nu_-1 and nu_-1 - nu_-2
            P, before, told, square = self.told
            square += float(a @ a)
            self.missed = 0.9 * self.missed + 0.1 * within(P, P.T @ a - told) / square
            self.at_stake = 0.9 * self.at_stake + 0.1 * within(P, before) / square
        gain = max(0.0, 1 - self.missed / self.at_stake) if self.at_stake > 0 else 0.0
        self.idle = 0 if self.told and gain > 0.05 else self.idle + 1
        lengths = B.norm(dim=0)
        B, W, lengths = (M[..., lengths > 0] for M in (B, W, lengths))
        U, S, Z = torch.linalg.svd(B / lengths, full_matrices=False)
        V, HV = U[:, S**2 > 1e-5], (W / lengths @ Z.T / S)[:, S**2 > 1e-5]
        error = float((V.T @ HV - HV.T @ V).norm()) / 2
        theta, E = torch.linalg.eigh((V.T @ HV + HV.T @ V) / 2)
        kept = theta > max(1e-3 * L, 2 * error)
        c = -(E[:, kept] * (1 / theta[kept])) @ (E[:, kept].T @ (V.T @ a))
        U, lengths, Z = torch.linalg.svd(HV, full_matrices=False)
        kept = lengths > max(1e-4 * L, 2 * error)
        c_R = -(Z[kept].T / lengths[kept]) @ (U[:, kept].T @ a)
        c = self.reach * c + (1 - self.reach) * c_R
        move, after = gain * V @ c, a + gain * HV @ c
        P, HP = B[:, :2], W[:, :2]
        self.told = P, P.T @ a, P.T @ after - HP.T @ after / L, float(a @ a)
        self.gains.append(gain)
        return self.nu + move - after / L


def within(P, along):
    """||projection on the span of P||^2 of a vector x with P' x = along."""
    R = torch.linalg.qr(P).R
    apart = P.shape[1] < 2 or float(R[1, 1]) ** 2 > 1e-5 * float(P[:, 1] @ P[:, 1])
    kept = slice(0, 2 if apart else 1)
    return float(torch.linalg.solve(R[kept, kept].T, along[kept]).square().sum())


def map_derivatives(f, phi, u, v):
    """f, |r|^2 / 2, f_u, f_v, r, r_v', r_u' at one point, for r = v - phi(u, v)."""
    r = v - phi(u, v)
    B = torch.eye(len(v), dtype=v.dtype) - jacrev(phi, 1)(u, v)
    E = -jacrev(phi, 0)(u, v)
    return f(u, v), 0.5 * r @ r, grad(f, 0)(u, v), grad(f, 1)(u, v), r, B.T, E.T


class FixedPointTwin(LeastSquaresTwin):
    """The same rule with r' in the place of H and L >= 1; here g is the map."""

    derivatives, least_curvature = staticmethod(map_derivatives), 1.0

    def moved(self, Hnu, a, L):
        return self.nu - a / L


class ValueGapTwin:
    def __init__(self, f, g, u, v, lr, lower_steps=1, weight=10.0, growth=0.0, relative=True):
        self.f, self.g, self.u, self.v, self.z = f, g, u.clone(), v.clone(), v.clone()
        self.upper, self.lower, self.tracker = Adam(lr), Adam(lr), Adam(lr)
        self.T, self.weight, self.growth, self.relative = lower_steps, weight, growth, relative
        self.k, self.R, self.A, self.L, self.D, self.S = 0, 0.0, 0.0, 0.0, 0.0, 0.0
        self.gamma = 0.0 if relative else weight

    def step(self):
        for _ in range(self.T):
            at = self.u, self.v
            self.value, f_u, f_v = self.f(*at), grad(self.f, 0)(*at), grad(self.f, 1)(*at)
            there = self.u, self.z
            r, t = grad(self.g, 1)(*at), grad(self.g, 1)(*there)
            change = grad(self.g, 0)(*at) - grad(self.g, 0)(*there)
            self.upper_grad = f_u + self.gamma * change
            self.q = self.gamma * (self.v - self.z)
            self.residual, self.certificate = r.norm(), (f_v + self.gamma * (r - t)).norm()
            self.R = 0.99 * self.R + 0.01 * float(r @ r)
            self.A = 0.99 * self.A + 0.01 * float(f_v @ f_v)
            new = self.weight * (self.scales(r, t, f_v) if self.relative else 1.0)
            new *= 1 + self.growth * self.k
            self.v = self.lower(self.v, r + f_v / new)
            self.z = self.tracker(self.z, t)
            self.gamma, self.k = new, self.k + 1
        self.u = self.upper(self.u, self.upper_grad)

    def scales(self, r, t, f_v):
        """S / (L D); nothing is near rounding in the tests."""
        left = (self.k / (self.k + 1)) ** 0.5
        self.S = max(float(f_v.norm()), math.sqrt(self.A), left * self.S)
        apart = float((self.v - self.z).norm())
        if apart > 0.01 * 2.0**-13 * float(self.z.norm()):  # eps^(1/4) = 2^-13
            self.L = max(0.9 * self.L, float((r - t).norm()) / apart)
        if self.L == 0.0:
            return float(f_v.norm() / r.norm())
        now = max(float(r.norm()), math.sqrt(self.R)) / self.L
        early = 0.1 * float(self.z.norm()) / math.sqrt(1 + self.k / 1000)
        self.D = max(now, left * self.D, early)
        return self.S / (self.L * self.D)


class EpsilonTestTwin:
    def __init__(self, f, g, u, v, lr, lower_steps=1, weight=1e-2, damping=1e-2, tolerance=1e-2):
        self.f, self.g, self.u, self.v = f, g, u.clone(), v.clone()
        self.upper, self.lower, self.T = Adam(lr), Adam(lr), lower_steps
        self.weight, self.damping, self.tolerance = weight, damping, tolerance
        self.nu, self.advances = torch.zeros_like(v), 0

    def _gradients(self):
        self.value, _, f_u, f_v, r, H, J = derivatives(self.f, self.g, self.u, self.v)
        q = self.nu + self.weight * r
        return r, f_u + J @ q, f_v + H @ q + self.damping * r

    def step(self):
        for _ in range(self.T):
            self.v = self.lower(self.v, self._gradients()[2])
        r, up, low = self._gradients()
        self.u, self.upper_grad = self.upper(self.u, up), up
        if up @ up + low @ low < self.tolerance**2:
            self.nu = self.nu + self.weight * r
            self.weight, self.damping = self.weight * 1.1, self.damping * 0.9
            self.tolerance, self.advances = self.tolerance * 0.9, self.advances + 1
