//! Writes a model's outputs and gradients for given tokens, to compare them with another framework.

use super::source::{Piece, Source};
use super::tensors::{Tensors, write};
use crate::config::{Layers, Precision};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::batch::Sequences;
use crate::routers::{Pass, Phase};
use crate::tape::{Gradients, Tape};
use crate::train::checkpoint::{self, Array, Content};
use std::path::{Path, PathBuf};

/// The input of [`dump`].
pub struct Options {
    /// A model's folder, a run or a checkpoint.
    pub model: PathBuf,
    /// A safetensors file with `tokens`, int64 `[B, S + 1]`.
    pub tokens: PathBuf,
    /// Precision of the arithmetic and of the output.
    pub dtype: Precision,
    /// Whether to run the model in training mode, and to write the router's new state as well.
    pub train: bool,
}

/// Writes `logits [B, S, V]`, `loss` (mean cross-entropy of the next tokens, without other losses) and `grad.NAME` for
/// every parameter, with the name and shape that it has in the model's files. In training mode it also writes the router's
/// new state. Returns lines for the user.
///
/// # Errors
/// When the model or the tokens cannot be read, the tokens do not fit the model, or `out` cannot be written.
pub fn dump(options: &Options, out: &Path) -> Result<Vec<String>> {
    let source = Source::open(&options.model)?;
    let (tokens, [sequences, length]) = read_tokens(options, source.file.model.vocab_size)?;
    let longest = source.file.model.sequence_length;
    if length > longest + 1 {
        return Err(Error::file(
            &options.tokens,
            format!("tokens [B, S + 1] with S up to the model's {longest}"),
            format!("[{sequences}, {length}]"),
            "use shorter sequences",
        ));
    }
    let mut config = source.config(&Layers::preset("tiny"))?;
    config.train.dtype = options.dtype;
    // The RoPE tables are made for the given length, not for the longest sequence.
    config.model.sequence_length = length - 1;
    let (model, pieces) = source.model(&config)?;
    let (tape, weights) = (Tape::new(), model.weights());
    let pass = Pass::single(match options.train {
        true => Phase::Train,
        false => Phase::Evaluate,
    });
    let (logits, loss) =
        model.logits_and_loss(&tape, &weights, Sequences::new(&tokens, sequences), pass)?;
    let mut store = Gradients::new(weights.len());
    let value = loss.tensor().clone();
    tape.backward(&loss, 1.0, &mut store)?;
    let logits = logits.reshape([sequences, length - 1, logits.shape().width()])?;
    let mut arrays = vec![
        Array::copied("logits", &logits),
        Array::copied("loss", &value),
    ];
    arrays.extend(gradients(&model, &pieces, &mut store));
    if options.train {
        model.end_step()?;
        let layers = config.model.moe_layers();
        for (layer, state) in layers.iter().zip(model.layer_states_mut().iter_mut()) {
            state.commit();
            let name = |name| checkpoint::router_state(*layer, name);
            let tensors = state.tensors();
            arrays.extend(tensors.map(|(own, tensor)| Array::copied(name(own), tensor)));
        }
    }
    write(out, &arrays)?;
    let predicted = sequences * (length - 1);
    Ok(vec![
        format!("model  {}", source.folder().display()),
        format!("loss   {:.12} nats, {predicted} tokens", value.item()?),
        format!("wrote  {} arrays to {}", arrays.len(), out.display()),
    ])
}

/// Returns the gradient of each piece of a parameter; zeros if the loss does not depend on the parameter.
fn gradients<'a>(
    model: &'a Model,
    pieces: &'a [Piece],
    store: &'a mut Gradients,
) -> impl Iterator<Item = Array<'static>> + 'a {
    pieces.iter().map(move |piece| {
        let like = &model.parameters[piece.parameter].value;
        let zeros = || crate::tensor::Tensor::zeros(like.device(), like.dtype(), like.shape());
        let gradient = store.get_or(piece.parameter, zeros);
        let (size, end) = (model.dtype().size(), piece.offset + piece.elements());
        Array {
            name: format!("grad.{}", piece.name),
            shape: piece.shape[..].into(),
            dtype: model.dtype(),
            content: Content::Bytes(gradient.bytes()[piece.offset * size..end * size].to_vec()),
        }
    })
}

fn read_tokens(options: &Options, vocabulary: usize) -> Result<(Vec<i32>, [usize; 2])> {
    let (tokens, shape) = Tensors::file(&options.tokens)?.integers("tokens")?;
    let wrong = |got: String, help: &str| {
        let expected = format!("`tokens` [B, S + 1] of int64 below {vocabulary}");
        Error::file(&options.tokens, expected, got, help)
    };
    let [sequences, length] = shape[..] else {
        return Err(wrong(format!("shape {shape:?}"), "write a matrix"));
    };
    if sequences == 0 || length < 2 {
        let help = "give a sequence of two tokens or more";
        return Err(wrong(format!("shape {shape:?}"), help));
    }
    let outside = |t: &&i64| !(0..vocabulary as i64).contains(*t);
    if let Some(token) = tokens.iter().find(outside) {
        let help = "use the model's tokenizer";
        return Err(wrong(format!("token {token}"), help));
    }
    let tokens = tokens.into_iter().map(|t| t as i32).collect();
    Ok((tokens, [sequences, length]))
}
