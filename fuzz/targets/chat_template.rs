//! Chat templates: compiling, and rendering a conversation.
#![no_main]

use oxiformers_processors::chat_template::{ChatTemplate, RenderOptions};
use serde_json::json;

libfuzzer_sys::fuzz_target!(|source: &str| {
    let Ok(template) = ChatTemplate::new(source) else {
        return;
    };
    let messages = [
        json!({"role": "system", "content": "Be brief."}),
        json!({"role": "user", "content": "What is 1 + 1?"}),
        json!({"role": "assistant", "content": "2", "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}]}),
        json!({"role": "user", "content": "Thanks"}),
    ];
    let _ = template.render(&messages, &RenderOptions::generation());
});
