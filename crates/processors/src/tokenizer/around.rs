//! What each kind of model expects around one text and around two.

use super::assemble::Place::{First, Second, Token};
use super::assemble::{self, Slot};
use super::config::TokenizerConfig;
use super::family::Family;
use super::model::Pipeline;
use super::{languages, legacy};
use crate::{Error, Result};

/// Puts around texts what models of this kind expect, where the format of the file does not say it.
pub(super) fn set(tokenizer: &mut Pipeline, file: &str, config: &TokenizerConfig) -> Result<()> {
    let role = |name: &str| {
        config
            .special_tokens
            .get(name)
            .map(String::as_str)
            .ok_or_else(|| {
                Error::format(
                    file,
                    format!("there is no {name}; name it in tokenizer_config.json"),
                )
            })
    };
    let (single, pair): (Vec<Slot<'_>>, Vec<Slot<'_>>) = match config.family {
        Family::Gpt2 | Family::Llama | Family::Other => return Ok(()),
        Family::Albert
        | Family::Bert
        | Family::BigBird
        | Family::Canine
        | Family::Deberta
        | Family::DebertaV2
        | Family::DistilBert
        | Family::FNet
        | Family::RemBert
        | Family::Tapas => {
            return assemble::surround_as_bert(tokenizer, file, role("cls_token")?, role("sep_token")?);
        }
        Family::MPNet | Family::Roberta => {
            let around = (role("cls_token")?, role("sep_token")?);
            let trim = config.flag("trim_offsets").unwrap_or(true);
            let prefix = config.family == Family::Roberta && legacy::prefix_space(config);
            return assemble::surround_as_roberta(tokenizer, file, around, trim, prefix);
        }
        Family::Barthez | Family::Camembert | Family::XlmRoberta => {
            let (cls, sep) = (Token(role("cls_token")?), Token(role("sep_token")?));
            let single = vec![(cls, 0), (First, 0), (sep, 0)];
            let pair = [&single[..], &[(sep, 0), (Second, 0), (sep, 0)]].concat();
            (single, pair)
        }
        Family::Funnel => {
            let (cls, sep) = (Token(role("cls_token")?), Token(role("sep_token")?));
            let single = vec![(cls, 2), (First, 0), (sep, 0)];
            let pair = [&single[..], &[(Second, 1), (sep, 1)]].concat();
            (single, pair)
        }
        Family::XLNet => {
            let (cls, sep) = (Token(role("cls_token")?), Token(role("sep_token")?));
            let single = vec![(First, 0), (sep, 0), (cls, 2)];
            let pair = vec![(First, 0), (sep, 0), (Second, 1), (sep, 1), (cls, 2)];
            (single, pair)
        }
        Family::ByT5 | Family::T5 => {
            let eos = Token(role("eos_token")?);
            (
                vec![(First, 0), (eos, 0)],
                vec![(First, 0), (eos, 0), (Second, 0), (eos, 0)],
            )
        }
        Family::Blenderbot => {
            let eos = Token(role("eos_token")?);
            (vec![(First, 0), (eos, 0)], vec![(First, 0), (Second, 1)])
        }
        Family::Marian | Family::Pegasus => {
            let eos = Token(role("eos_token")?);
            (
                vec![(First, 0), (eos, 0)],
                vec![(First, 0), (Second, 0), (eos, 0)],
            )
        }
        Family::XGlm => {
            let eos = Token(role("eos_token")?);
            (
                vec![(eos, 0), (First, 0)],
                vec![(eos, 0), (First, 0), (eos, 0), (eos, 0), (Second, 0)],
            )
        }
        Family::M2M100 | Family::MBart | Family::MBart50 | Family::Nllb | Family::PLBart => {
            let language = languages::source(config);
            let processor = languages::around(file, config, language.as_deref(), |token| {
                tokenizer.token_to_id(token)
            })?;
            tokenizer.with_post_processor(Some(processor));
            return Ok(());
        }
    };
    let processor = assemble::template(file, &single, &pair, |token| tokenizer.token_to_id(token))?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}
