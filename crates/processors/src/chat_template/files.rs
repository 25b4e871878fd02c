//! Chat templates from the files of a model.

use indexmap::IndexMap;
use oxiformers_hub::ModelFiles;
use serde_json::{Map, Value};

use super::ChatTemplate;
use crate::Result;

/// Special tokens that every template may ask for.
const SPECIAL: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl ChatTemplate {
    /// The templates of a model with its special tokens, or `None` when it has none.
    ///
    /// `chat_template.jinja` (or the older `chat_template.json`) goes before the `chat_template` of
    /// `tokenizer_config.json`; `additional_chat_templates/NAME.jinja` are the named ones.
    pub fn from_files(files: &ModelFiles) -> Result<Option<Self>> {
        let config: Map<String, Value> = files.json("tokenizer_config.json")?.unwrap_or_default();
        let mut templates = IndexMap::new();
        match config.get("chat_template") {
            Some(Value::String(source)) => {
                templates.insert("default".to_string(), source.clone());
            }
            Some(Value::Array(list)) => {
                for item in list {
                    let text = |key: &str| item.get(key).and_then(Value::as_str).map(str::to_string);
                    if let (Some(name), Some(source)) = (text("name"), text("template")) {
                        templates.insert(name, source);
                    }
                }
            }
            Some(Value::Object(map)) => {
                templates.extend(map.iter().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_string()))));
            }
            _ => {}
        }
        if let Some(old) = files.json::<Map<String, Value>>("chat_template.json")? {
            if let Some(source) = old.get("chat_template").and_then(Value::as_str) {
                templates.insert("default".into(), source.into());
            }
        }
        let folder = "additional_chat_templates/";
        let named: Vec<String> = files.names().filter(|name| name.starts_with(folder)).map(String::from).collect();
        let file = files.text("chat_template.jinja")?;
        if file.is_some() || !named.is_empty() {
            // Template files replace what the configuration says, all of it.
            templates.clear();
        }
        if let Some(source) = file {
            templates.insert("default".into(), source);
        }
        for path in named {
            if let Some(name) = path.strip_prefix(folder).and_then(|name| name.strip_suffix(".jinja")) {
                if let Some(source) = files.text(&path)? {
                    templates.insert(name.to_string(), source);
                }
            }
        }
        if templates.is_empty() {
            return Ok(None);
        }
        let mut tokens: Map<String, Value> = files.json("special_tokens_map.json")?.unwrap_or_default();
        tokens.extend(config);
        let tokens = tokens.iter().filter_map(|(name, value)| special_token(name, value));
        Ok(Some(Self::named(templates)?.with_special_tokens(tokens)))
    }
}

/// `NAME_token` with its text, given plain or as an added token.
fn special_token(name: &str, value: &Value) -> Option<(String, String)> {
    let known = SPECIAL.contains(&name) || (name.ends_with("_token") && !name.starts_with("add_"));
    let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
    known.then(|| (name.to_string(), text.to_string()))
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
        let files = |list: &[(&str, &str)]| {
            ModelFiles::from_memory(
                "m",
                list.iter().map(|(name, text)| (name.to_string(), text.as_bytes().to_vec().into())),
            )
        };
        let user = [crate::Message::user("x")];
        let template = ChatTemplate::from_files(&files(&[("tokenizer_config.json", config)])).unwrap().unwrap();
        assert_eq!(template.render(&user, &RenderOptions::default()).unwrap(), "<s>d");
        assert_eq!(template.render(&user, &RenderOptions::default().with_tools(vec![])).unwrap(), "</s>t");

        let jinja = [("tokenizer_config.json", config), ("chat_template.jinja", "file{{ bos_token }}")];
        let template = ChatTemplate::from_files(&files(&jinja)).unwrap().unwrap();
        assert_eq!(template.render(&user, &RenderOptions::default()).unwrap(), "file<s>");
        assert!(ChatTemplate::from_files(&files(&[])).unwrap().is_none());
        let broken = files(&[("chat_template.jinja", "{% if %}")]);
        assert!(ChatTemplate::from_files(&broken).unwrap_err().to_string().contains("line 1"));
    }
}
