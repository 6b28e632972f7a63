//! The shapes with which the router's forward is checked.

use super::router::Kind::*;
use super::router::{Kind, SCORES, Shape};
use crate::kernels::bindings::*;

/// Tokens, experts, hidden, choices.
type Sizes = (usize, usize, usize, usize);

fn shape((tokens, experts, hidden, choices): Sizes, score: routegrad_score, kind: Kind) -> Shape {
    Shape {
        tokens,
        experts,
        hidden,
        choices,
        score,
        kind,
    }
}

/// Shapes that every build runs under every schedule.
pub fn small_shapes() -> Vec<Shape> {
    let softmax = ROUTEGRAD_SCORE_SOFTMAX;
    let mut all: Vec<Shape> = [(1, 1, 8, 1), (1, 8, 200, 2), (131, 7, 136, 3)]
        .into_iter()
        .map(|sizes| shape(sizes, softmax, Ordinary))
        .collect();
    all.extend(SCORES.map(|score| shape((67, 33, 328, 4), score, Biased)));
    all.extend([
        shape((40, 8, 72, 3), softmax, Ties),
        shape((40, 8, 72, 8), softmax, NonFinite),
        shape((70, 9, 40, 0), ROUTEGRAD_SCORE_RELU, Ordinary),
    ]);
    all
}

/// Every padded number of experts with every score; prime numbers of tokens; widths that are not multiples of a tile.
pub fn covering_shapes() -> Vec<Shape> {
    let sizes = [
        (2039, 8, 72, 1),
        (509, 16, 1032, 16),
        (509, 32, 136, 4),
        (300, 64, 264, 8),
        (257, 128, 72, 2),
        (130, 256, 200, 16),
    ];
    let mut all: Vec<Shape> = sizes
        .into_iter()
        .flat_map(|sizes| SCORES.map(|score| shape(sizes, score, Ordinary)))
        .collect();
    for kind in [Biased, Ties, OneExpert, NonFinite, Large] {
        let score = |i: usize| SCORES[(i + kind as usize) % 4];
        let more = [(300, 16, 72, 4), (131, 64, 136, 2), (70, 255, 40, 16)];
        all.extend((0..3).map(|i| shape(more[i], score(i), kind)));
    }
    all.push(shape((300, 48, 72, 0), ROUTEGRAD_SCORE_RELU, NonFinite));
    all
}
