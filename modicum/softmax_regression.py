"""Many softmax regressions on the same features, solved side by side: one pass over the features a step serves them all.

The objective is scikit-learn's, C * sum of cross-entropies + |W|^2 / 2 with a free intercept, divided by C times the number of images.
Loss and gradient are two matrix products a chunk, written out: automatic differentiation would keep every logit and read the features in
the slower direction. L-BFGS starts from the curvature along the features' principal axes, which are found once: in them the problem is
nearly round, so that it takes few steps, and numbers rounded to bf16 do not cancel.
"""

import torch

LOGITS = 2**19  # at a time: they stay in the cache between the two products
SMALL = 2**22  # numbers up to which a problem is worth float64: it is cheap there, and the solution ends closer to the optimum
ROUGH = {torch.float32: 3e-4, torch.float64: 1e-5}  # tolerances: to rank problems
FINE = {torch.float32: 3e-5, torch.float64: 1e-8}  # and for a solution that is used
SURVEYED = 10_000  # images that the principal axes are taken from: any axes give the same solution, good ones give it soon
MEMORY, REMEMBERED = 10, 2**28  # steps that L-BFGS remembers, unless they hold more numbers than this


def worthwhile_precision(features: torch.Tensor) -> torch.dtype:
    """float64 for small problems, where the device has it."""
    return torch.float64 if features.numel() <= SMALL and features.device.type != "mps" else torch.float32


class SoftmaxRegression:
    """Problems on `features` (N, D), float32 or float64, with `labels` int64 (N,) in 0..num_classes-1, or shares of the classes (N, C).

    Solutions are (Q, C, R + 1) for Q problems: weights along the R = min(N, D) principal axes, then the intercept.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
        self.labels, self.num_classes = labels, num_classes
        self.mean = features.mean(dim=0)
        if len(features) < features.shape[1]:  # the solution lies in the span of the images: N dimensions hold it, exactly
            basis, triangle = torch.linalg.qr((features - self.mean).T)
            variances, turn = _principal_axes(triangle @ triangle.T / len(features))
            self.axes, self.features = basis @ turn, triangle.T @ turn  # (D, R), (N, R)
        else:
            some = features[:: -(-len(features) // SURVEYED)] - self.mean
            variances, self.axes = _principal_axes(some.T @ some / len(some))
            self.features = torch.addmm(-(self.mean @ self.axes), features, self.axes)
        curvature = (num_classes - 1) / num_classes**2  # of the loss in one class's logit, while all classes are equally likely
        self.curvature = curvature * torch.cat([variances, variances.new_ones(1)])

    def solve(
        self,
        strengths: torch.Tensor,
        used: torch.Tensor,
        tolerance: float,
        max_iterations: int,
        start: torch.Tensor | None = None,
        precision: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The solutions (Q, C, R + 1) for each C of `strengths` (Q,) on the images in `used`, bool (Q, N).

        A problem is left when L-BFGS expects to lower its objective by less than the share `tolerance`, or after `max_iterations` passes
        over the features. Up to 25 times that share was found to be left then, in float32 on two threads once 46 times. A share, because
        the objective nears 0 where classes can be separated, and its last digits decide there. bfloat16 as `precision` rounds what is
        multiplied: thrice as fast, for tolerances from 1e-4 up.
        """
        features = self.features.to(precision or self.features.dtype)
        counts = used.sum(dim=1, keepdim=True)
        share = (used / counts).to(self.features)  # every image's part in its problem's mean
        decay = (1 / (strengths.to(self.features) * counts[:, 0]))[:, None, None].repeat(1, 1, len(self.curvature))
        decay[..., -1] = 0
        inverse = 1 / (self.curvature + decay).clamp(min=torch.finfo(decay.dtype).tiny)
        weights = start if start is not None else decay.new_zeros(len(strengths), self.num_classes, len(self.curvature))
        unsolved = torch.ones(len(strengths), dtype=torch.bool, device=decay.device)
        value, gradient = self._evaluate(features, weights, decay, share, unsolved)
        memory = min(max(REMEMBERED // weights.numel(), 5), MEMORY)
        history: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        scale, step = torch.ones_like(value), torch.ones_like(value)
        direction = inverse * gradient
        descent = _dot(gradient, direction)
        for _ in range(max_iterations):
            unsolved &= (descent / 2 >= tolerance * value) & (step > 1e-3)
            if not unsolved.any():
                break
            moved = -step[:, None, None] * direction
            new_value, new_gradient = self._evaluate(features, weights + moved, decay, share, unsolved)
            # A rise by less than a tenth of the tolerance is not told from rounding.
            accepted = unsolved & (new_value <= value - 1e-4 * step * descent + tolerance * value / 10)
            change = new_gradient - gradient
            along = _dot(moved, change)
            curved = accepted & (along > 0)
            history = [*history[1 - memory :], (moved, change, torch.where(curved, 1 / along, 0))]  # 0: not to be remembered
            scale = torch.where(curved, along / _dot(change, inverse * change), scale)
            lowest = step * step * descent / (2 * (new_value - value + step * descent))  # of the parabola through what is known
            step = torch.where(accepted, 1, lowest.nan_to_num(0).clamp(step / 10, step / 2))
            taken = accepted[:, None, None]
            weights = torch.where(taken, weights + moved, weights)
            gradient, value = torch.where(taken, new_gradient, gradient), torch.where(accepted, new_value, value)
            direction = torch.where(taken, _quasi_newton(gradient, inverse * scale[:, None, None], history), direction)
            descent = _dot(gradient, direction)
        return weights

    def _evaluate(
        self, features: torch.Tensor, weights: torch.Tensor, decay: torch.Tensor, share: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Objectives (Q,) and their gradients (Q, C, R + 1), of the `wanted` problems; others' are 0."""
        some = weights[wanted]
        rows, intercepts = some[..., :-1].flatten(0, 1).to(features.dtype), some[..., -1:]
        value, gradient = some.new_zeros(len(some)), torch.zeros_like(some)
        chunk = max(LOGITS // rows.shape[0], 256)
        for part, labels, weight in zip(features.split(chunk), self.labels.split(chunk), share[wanted].split(chunk, dim=1), strict=True):
            logits = (rows @ part.T).to(some.dtype).unflatten(0, some.shape[:2]) + intercepts  # (Q, C, n)
            logarithms = logits.log_softmax(dim=1)
            if labels.ndim == 1:
                own = labels.expand(len(some), 1, -1)
                likelihood = logarithms.gather(1, own)[:, 0]
                error = logarithms.exp_().scatter_add_(1, own, weight.new_full((), -1).expand(own.shape))
            else:
                likelihood = (logarithms * labels.T).sum(dim=1)
                error = logarithms.exp_().sub_(labels.T)
            value -= (likelihood * weight).sum(dim=1)
            error.mul_(weight[:, None])
            gradient[..., :-1] += (error.flatten(0, 1).to(features.dtype) @ part).unflatten(0, some.shape[:2])
            gradient[..., -1] += error.sum(dim=2)
        pull = decay[wanted] * some
        values, gradients = torch.zeros_like(share[:, 0]), torch.zeros_like(weights)
        values[wanted], gradients[wanted] = value + _dot(pull, some) / 2, gradient + pull
        return values, gradients

    def scores(self, solution: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits (n, C) of the images in `rows`, bool (N,), by one solution (C, R + 1)."""
        return self.features[rows] @ solution[:, :-1].T + solution[:, -1]

    def linear_map(self, solution: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (D, C) and intercepts (C,) for features as they were given, of one solution (C, R + 1)."""
        weight = self.axes @ solution[:, :-1].T
        return weight, solution[:, -1] - self.mean @ weight


def _principal_axes(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances (R,) and axes, the columns of (R, R). On the CPU in float64, which not every device has."""
    variances, axes = torch.linalg.eigh(covariance.cpu().double())
    return variances.clamp(min=0).to(covariance), axes.to(covariance)


def _quasi_newton(
    gradient: torch.Tensor, inverse: torch.Tensor, history: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """The inverse Hessian times `gradient`, as remembered from (move, change of the gradient, 1 / their product) upon `inverse`.

    The two loops of L-BFGS (Nocedal 1980), each problem with its own products.
    """
    left, shares = gradient, []
    for move, change, reciprocal in reversed(history):
        shares.append((reciprocal * _dot(move, left))[:, None, None])
        left = torch.addcmul(left, shares[-1], change, value=-1)
    result = inverse * left
    for (move, change, reciprocal), share in zip(history, reversed(shares), strict=True):
        result = torch.addcmul(result, share - (reciprocal * _dot(change, result))[:, None, None], move)
    return result


def _dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(Q,)"""
    return (first.flatten(1)[:, None] @ second.flatten(1)[..., None])[:, 0, 0]
