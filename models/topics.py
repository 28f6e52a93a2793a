r"""Topic models of word counts: mixtures of topics under the Dirichlet prior they are meant to have, and under its stand-in.

.. math:: \theta_i \sim \mathrm{Dirichlet}(\alpha, \dots, \alpha), \qquad
          x_i \sim \mathrm{Multinomial}(n_i, \mathrm{softmax}(\mathrm{BN}(\beta^\top\theta_i))).

Variational autoencoders for text replace the Dirichlet by the softmax of a normal, for lack of a reparametrised density.
Both are here, around one decoder and one encoder, so that nothing but the prior and its inference differs.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

Model = Callable[[Tensor], None]


class TopicDecoder(nn.Module):
    r"""Shares of topics ``(..., num_topics)`` to log probabilities of words ``(..., vocabulary_size)``.

    ``"product"``, of Srivastava and Sutton 2017: :math:`\mathrm{softmax}(\mathrm{BN}(\beta^\top\theta))`, where topics
    multiply as experts do. ``"mixture"``, of Blei, Ng and Jordan 2003: a topic is a distribution of words,
    :math:`\sum_k\theta_k\,\mathrm{softmax}(\mathrm{BN}(\beta)_k)`.

    :param dropout: of the shares, in training
    :param offset: learn a logit for every word, which tells how frequent it is whatever the topics. Normalisation takes just
        that away, and Pyro's tutorial does without
    :raises ValueError: an unknown ``kind``

    >>> TopicDecoder(5, 30)(torch.full((8, 5), 0.2)).shape
    torch.Size([8, 30])
    """

    def __init__(
        self,
        num_topics: int,
        vocabulary_size: int,
        kind: str = "product",
        dropout: float = 0.2,
        offset: bool = True,
    ) -> None:
        super().__init__()
        if kind not in ("product", "mixture"):
            raise ValueError(f"kind is {kind!r}: expected 'product' or 'mixture'")
        self.kind = kind
        self.beta = nn.Linear(num_topics, vocabulary_size, bias=False)
        self.norm = nn.BatchNorm1d(vocabulary_size, affine=False)
        self.offset = nn.Parameter(torch.zeros(vocabulary_size)) if offset else 0.0
        self.dropout = nn.Dropout(dropout)

    @property
    def topics(self) -> Tensor:
        """Weights of the words in every topic, ``(num_topics, vocabulary_size)``; the largest say what it is about."""
        return self.beta.weight.detach().T

    def forward(self, theta: Tensor) -> Tensor:
        """Shares to log probabilities."""
        theta = self.dropout(theta)
        if self.kind == "mixture":
            words = (self.norm(self.beta.weight.T) + self.offset).softmax(-1)
            theta = theta + 1e-6  # equal shares where dropout took all
            return (theta / theta.sum(-1, keepdim=True) @ words).log()
        logits = self.beta(theta)
        normalised = self.norm(logits.reshape(-1, logits.shape[-1])).reshape(logits.shape)
        return (normalised + self.offset).log_softmax(-1)


class BagOfWords(dist.Multinomial):
    r"""Multinomial of counts whose total is the document's own, without the multinomial coefficient.

    The coefficient says in how many orders the words can stand. No parameter is in it, and on a large vocabulary its
    gamma functions cost more than all the rest of the density. So this is the density of the words in their order:
    :math:`\sum_w x_w\log p_w`. Draws have ``total_count`` words.

    >>> BagOfWords(3, probs=torch.full((4,), 0.25)).log_prob(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    tensor(-2.7726)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Counts ``(..., vocabulary_size)`` to log densities."""
        if self._validate_args:
            self._validate_sample(value)
        return (value * self.logits).sum(-1)


class TopicEncoder(nn.Module):
    """Counts ``(n, vocabulary_size)`` to codes ``(n, width)``: logarithms of one plus the count, then a perceptron.

    :param thinning: in training, the probability with which every single word is left out of what the encoder reads, so
        that it learns to tell the topics of a document from a part of it
    :param dropout: of the hidden layer, in training

    >>> TopicEncoder(30, width=16)(torch.ones(8, 30)).shape
    torch.Size([8, 16])
    """

    def __init__(
        self, vocabulary_size: int, width: int = 128, dropout: float = 0.2, thinning: float = 0.5
    ) -> None:
        super().__init__()
        self.thinning = thinning
        self.layers = nn.Sequential(
            nn.Linear(vocabulary_size, width),
            nn.Softplus(),
            nn.Linear(width, width),
            nn.Softplus(),
            nn.Dropout(dropout),
            nn.BatchNorm1d(width, affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Counts to codes."""
        if self.training and self.thinning:
            x = torch.binomial(x, torch.full_like(x, 1 - self.thinning))
        return self.layers(x.log1p())


def prod_lda(
    num_topics: int,
    vocabulary_size: int,
    concentration: float = 0.1,
    decoder: TopicDecoder | None = None,
) -> Model:
    r"""Documents as mixtures of topics, :math:`\theta_i\sim\mathrm{Dirichlet}(\alpha,\dots,\alpha)`.

    The generative program of Srivastava and Sutton 2017, *Autoencoding variational inference for topic models*, with the
    prior it is named after; for ``Trace_Sinkhorn``, with ``AutoImplicit(model, encoder=TopicEncoder(vocabulary_size))``.

    :param concentration: of the Dirichlet; below 1, a document has few topics
    :param decoder: default ``TopicDecoder(num_topics, vocabulary_size)``

    >>> model = prod_lda(num_topics=5, vocabulary_size=30)
    >>> model(torch.ones(8, 30))
    """
    decoder = TopicDecoder(num_topics, vocabulary_size) if decoder is None else decoder

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        alpha = x.new_full((num_topics,), concentration)
        with pyro.plate("documents", len(x)):
            theta = pyro.sample("theta", dist.Dirichlet(alpha))
            _observe(x, decoder(theta))

    return model


def prod_lda_normal(
    num_topics: int,
    vocabulary_size: int,
    concentration: float | None = None,
    decoder: TopicDecoder | None = None,
) -> Model:
    r"""The same documents with the softmax of a normal in place of the Dirichlet, which is what an ELBO can do.

    .. math:: \theta_i = \mathrm{softmax}(h_i), \qquad h_i \sim N(0, \sigma^2 I).

    :param concentration: None for :math:`\sigma = 1`, as in Pyro's tutorial; else the Laplace approximation to a Dirichlet in
        the softmax basis (MacKay 1998), :math:`\sigma^2 = (1 - 1/K)/\alpha`
    :param decoder: default ``TopicDecoder(num_topics, vocabulary_size)``

    >>> model = prod_lda_normal(num_topics=5, vocabulary_size=30)
    >>> model(torch.ones(8, 30))
    """
    decoder = TopicDecoder(num_topics, vocabulary_size) if decoder is None else decoder
    variance = 1.0 if concentration is None else (1 - 1 / num_topics) / concentration

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("documents", len(x)):
            h = pyro.sample("h", dist.Normal(x.new_zeros(num_topics), variance**0.5).to_event(1))
            _observe(x, decoder(h.softmax(-1)))

    return model


class SoftmaxNormalGuide(PyroModule):
    r"""Guide with a density for :func:`prod_lda_normal`, for ``TraceMeanField_ELBO``: :math:`h_i\sim N(m(x_i), s(x_i)^2 I)`.

    Means and log variances are normalised over the batch, without which components collapse (Srivastava and Sutton 2017).

    :param encoder: counts to codes, such as :class:`TopicEncoder`
    :param width: of the codes
    :param head: from codes to means and log variances, ``2 * num_topics`` in all; default a linear map, as in Pyro's tutorial

    >>> guide = SoftmaxNormalGuide(TopicEncoder(30), num_topics=5)
    >>> guide(torch.ones(8, 30)).shape
    torch.Size([8, 5])
    """

    def __init__(
        self, encoder: nn.Module, num_topics: int, width: int = 128, head: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2 * num_topics) if head is None else head
        self.norm = nn.BatchNorm1d(2 * num_topics, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """Sample what the softmax makes shares of."""
        mean, log_variance = self.norm(self.head(self.encoder(x))).chunk(2, -1)
        normal = dist.Normal(mean, (0.5 * log_variance).exp())
        with pyro.plate("documents", len(x)):
            return pyro.sample("h", normal.to_event(1))


def _observe(x: Tensor, log_probabilities: Tensor) -> None:
    total = int(x.sum(-1).max()) if x.numel() else 0
    pyro.sample("x", BagOfWords(total, logits=log_probabilities), obs=x)
