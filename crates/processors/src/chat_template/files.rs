//! Chat templates from the files of a model.

use indexmap::IndexMap;
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::gguf::Value as GgufValue;
use serde_json::{Map, Value};

use super::ChatTemplate;
use crate::{Result, Tokenizer};

impl ChatTemplate {
    /// The templates of a model, or `None` when it has none; the special tokens that they may ask for are the
    /// tokenizer's.
    ///
    /// Template files (`chat_template.jinja`, `additional_chat_templates/NAME.jinja`) stand for all there is;
    /// else `chat_template.json` goes before the `chat_template` of `tokenizer_config.json` (a text, a list of
    /// `{"name", "template"}`, or an object by name), and that before what a GGUF holds
    /// (`tokenizer.chat_template`, `tokenizer.chat_template.NAME`).
    ///
    /// # Errors
    /// When a file cannot be read or a template does not compile.
    pub fn from_files(files: &ModelFiles, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let templates = sources(files)?;
        if templates.is_empty() {
            return Ok(None);
        }
        Ok(Some(
            Self::named(templates)?.with_special_tokens(tokenizer.special_tokens_map()),
        ))
    }
}

/// The Jinja sources by name.
fn sources(files: &ModelFiles) -> Result<IndexMap<String, String>> {
    let mut found = IndexMap::new();
    for path in files.names() {
        let name = match path {
            "chat_template.jinja" => Some("default"),
            path => path
                .strip_prefix("additional_chat_templates/")
                .and_then(|file| file.strip_suffix(".jinja")),
        };
        if let Some(name) = name
            && let Some(source) = files.text(path)?
        {
            found.insert(name.to_owned(), source);
        }
    }
    if !found.is_empty() {
        return Ok(found);
    }
    for file in ["tokenizer_config.json", "chat_template.json"] {
        match files
            .json::<Map<String, Value>>(file)?
            .and_then(|mut json| json.remove("chat_template"))
        {
            Some(Value::String(source)) => {
                found.insert("default".to_owned(), source);
            }
            Some(Value::Array(list)) => {
                for item in list {
                    let text = |key: &str| item.get(key)?.as_str().map(str::to_owned);
                    found.extend(text("name").zip(text("template")));
                }
            }
            Some(Value::Object(named)) => {
                for (name, source) in named {
                    if let Value::String(source) = source {
                        found.insert(name, source);
                    }
                }
            }
            _ => {}
        }
    }
    if found.is_empty()
        && let Some(metadata) = files.gguf_metadata()?
    {
        for (key, value) in metadata.iter() {
            if let (Some(name), GgufValue::String(source)) =
                (key.strip_prefix("tokenizer.chat_template"), value)
            {
                let name = name.strip_prefix('.').unwrap_or("default");
                found.insert(name.to_owned(), source.clone());
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RenderOptions;

    #[test]
    fn templates_of_a_folder() {
        let config = r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": true,
            "chat_template": [{"name": "default", "template": "{{ bos_token }}d"},
                              {"name": "tool_use", "template": "{{ eos_token }}t"}]}"#;
        let load = |list: &[(&str, &str)]| {
            let vocab = [("vocab.txt", "[UNK]\n[CLS]\n[SEP]\n<s>\n</s>\n")];
            let files = vocab.iter().chain(list);
            let files = ModelFiles::from_memory(
                "m",
                files
                    .map(|(name, text)| (name.to_string(), text.as_bytes().to_vec().into()))
                    // Weights are no text and none of our business.
                    .chain([("weights.bin".to_string(), vec![0xFF; 8].into())]),
            );
            ChatTemplate::from_files(&files, &Tokenizer::from_files(&files).unwrap())
        };
        let user = [crate::Message::user("x")];
        let template = load(&[("tokenizer_config.json", config)]).unwrap().unwrap();
        assert_eq!(template.render(&user, &RenderOptions::default()).unwrap(), "<s>d");
        assert_eq!(
            template
                .render(&user, &RenderOptions::default().with_tools(vec![]))
                .unwrap(),
            "</s>t"
        );

        let jinja = [
            ("tokenizer_config.json", config),
            ("chat_template.jinja", "file{{ bos_token }}"),
        ];
        let template = load(&jinja).unwrap().unwrap();
        assert_eq!(
            template.render(&user, &RenderOptions::default()).unwrap(),
            "file<s>"
        );
        assert!(load(&[]).unwrap().is_none());
        let broken = load(&[("chat_template.jinja", "{% if %}")]);
        assert!(broken.unwrap_err().to_string().contains("line 1"));
    }
}
