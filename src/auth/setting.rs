//! A setting: one JSON text, of limits or of schemas, that an operator changes while it is in use.
//!
//! The registry keeps the text and knows nothing of what it says. Whoever does, reads it once and
//! leaves what came of it here, beside the text; a new text takes it away again. So a message's path
//! never parses, and sees a change at the next look.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;

/// One text, or none, and what was made of it. Eight bytes until the first use.
#[derive(Default)]
pub struct Setting(ArcSwapOption<Stated>);

/// One text, from one change to the next.
#[derive(Default)]
struct Stated {
    text: Option<Arc<str>>,
    made: OnceLock<Arc<dyn Any + Send + Sync>>,
}

impl Setting {
    /// A setting with this text.
    pub(super) fn new(text: Option<&str>) -> Self {
        // Most are not set, and there may be millions.
        Self(ArcSwapOption::from(text.map(|text| stated(Some(text.into())))))
    }

    /// Whether there is a text.
    pub fn is_set(&self) -> bool {
        self.0.load().as_ref().is_some_and(|stated| stated.text.is_some())
    }

    /// The text, if it is set.
    pub fn text(&self) -> Option<Arc<str>> {
        self.0.load().as_ref()?.text.clone()
    }

    /// What `make` makes of the text, or of there being none. It is called once for each text: what it
    /// made is kept until the text changes, so that it may hold state too (a limit's account). After
    /// the first time this is free of locks. Who keeps the result beyond one read of a socket asks
    /// again, or does not see a change.
    ///
    /// # Panics
    /// If one setting is made into two types: each has one reader.
    pub fn made<T: Send + Sync + 'static>(&self, make: impl FnOnce(Option<&str>) -> T) -> Arc<T> {
        if self.0.load().is_none() {
            // Another thread's may be there by now, or even a text: then that one stands.
            self.0.compare_and_swap(&None::<Arc<Stated>>, Some(stated(None)));
        }
        let stated = self.0.load();
        let stated = stated.as_ref().expect("once it is there, one only takes another's place");
        let made = stated.made.get_or_init(|| Arc::new(make(stated.text.as_deref())));
        Arc::clone(made).downcast().expect("each setting is made into one type")
    }

    /// Another text, or none any more. What was made of the one before is let go.
    pub(super) fn set(&self, text: Option<&str>) {
        self.0.store(Some(stated(text.map(Arc::from))));
    }
}

fn stated(text: Option<Arc<str>>) -> Arc<Stated> {
    Arc::new(Stated { text, made: OnceLock::new() })
}

impl fmt::Debug for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Setting").field(&self.text()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_read_once_and_again_after_a_change() {
        let setting = Setting::new(Some("1"));
        let parse = |text: Option<&str>| text.map(|text| text.parse::<u32>().expect("a number"));
        let first = setting.made(parse);
        assert_eq!(*first, Some(1));
        assert!(Arc::ptr_eq(&first, &setting.made(|_| -> Option<u32> { panic!("read twice") })));
        setting.set(Some("2"));
        assert_eq!(setting.text().as_deref(), Some("2"));
        assert_eq!(*setting.made(parse), Some(2));
        assert!(setting.is_set());
        setting.set(None);
        assert!(!setting.is_set() && !Setting::default().is_set());
        assert_eq!(setting.text(), None);
        assert_eq!(*setting.made(parse), None);
        assert_eq!(*first, Some(1), "who holds the earlier one goes on with it");
    }

    #[test]
    fn what_is_made_of_no_text_is_kept_too() {
        let setting = Setting::default();
        let first = setting.made(|text| text.map(str::len));
        assert_eq!(*first, None);
        assert!(Arc::ptr_eq(&first, &setting.made(|_| Some(0_usize))));
    }

    #[test]
    fn a_setting_that_is_not_set_costs_little() {
        assert_eq!(size_of::<Setting>(), 8);
    }
}
