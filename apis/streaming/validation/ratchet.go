package validation

import (
	"reflect"
	"regexp"
	"strconv"
	"strings"

	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// inputs are what a rule looked at that concerns more than the field that its
// error names. They are the error's bad value, where its text shows none.
type inputs []any

// setLists are the lists whose items each stand for themselves, whatever their
// place.
var setLists = sets.New("spec.sources", "spec.agents", "spec.users", "spec.addresses.allow", "spec.addresses.deny")

// ratchet validates an object that replaces an old one, and returns the errors
// to refuse it for: an old object's error isn't held against the new one as
// long as what the rule looked at stays the same. So a rule that was added
// since can't keep the rest of an object from being changed.
//
// What a rule looked at is its inputs, or else the value at the error's field:
// for an item that is a duplicate, the list; within a list that has neither a
// key nor set semantics, the list as well, because it is replaced as a whole.
// Items of lists with a key are compared with those of the same key.
func ratchet[T any](newObj, oldObj *T, validate func(*T) field.ErrorList) field.ErrorList {
	newErrs := validate(newObj)
	if len(newErrs) == 0 {
		return nil
	}
	old := map[fault][]any{}
	for _, err := range validate(oldObj) {
		f, value := faultOf(err, oldObj)
		old[f] = append(old[f], value)
	}
	var errs field.ErrorList
	for _, err := range newErrs {
		f, value := faultOf(err, newObj)
		if i := indexOf(old[f], value); i >= 0 {
			// Each excuses one: of two equal items, the second may be new.
			old[f] = append(old[f][:i:i], old[f][i+1:]...)
			continue
		}
		errs = append(errs, err)
	}
	return errs
}

func indexOf(values []any, value any) int {
	for i := range values {
		if apiequality.Semantic.DeepEqual(values[i], value) {
			return i
		}
	}
	return -1
}

// fault is an error without what it is about: its place names the items of
// lists by their keys.
type fault struct {
	place  string
	kind   field.ErrorType
	detail string
}

func faultOf(err *field.Error, obj any) (fault, any) {
	place, value, list := lookUp(reflect.ValueOf(obj).Elem(), err.Field)
	f := fault{place, err.Type, err.Detail}
	if in, ok := err.BadValue.(inputs); ok {
		return f, in
	}
	if err.Type == field.ErrorTypeDuplicate && list.IsValid() {
		value = list
	}
	return f, value.Interface()
}

var segmentRegexp = regexp.MustCompile(`[^.\[\]]+|\[[^\]]*\]`)

// lookUp follows the path of an error through an object of the hub. It returns
// where that is, the value there, and the list that it passed through last.
// What can't be followed to its end is taken for the whole that it is part of.
func lookUp(value reflect.Value, path string) (place string, at, list reflect.Value) {
	for _, segment := range segmentRegexp.FindAllString(path, -1) {
		for value.Kind() == reflect.Pointer && !value.IsNil() {
			value = value.Elem()
		}
		key, indexed := strings.CutPrefix(segment, "[")
		key = strings.TrimSuffix(key, "]")
		var next reflect.Value
		switch {
		case indexed && value.Kind() == reflect.Slice:
			i, err := strconv.Atoi(key)
			if err != nil || i < 0 || i >= value.Len() {
				return place, value, list
			}
			if key, indexed = itemKey(place, value.Index(i)); !indexed {
				return place, value, value
			}
			list, next = value, value.Index(i)
			place += "[" + key + "]"
		case indexed && value.Kind() == reflect.Map:
			next = value.MapIndex(reflect.ValueOf(key).Convert(value.Type().Key()))
			place += "[" + key + "]"
		case value.Kind() == reflect.Struct:
			next = value.FieldByNameFunc(func(name string) bool { return strings.EqualFold(jsonName(name), segment) })
			place = strings.TrimPrefix(place+"."+segment, ".")
		}
		if !next.IsValid() {
			return place, value, list
		}
		value = next
	}
	return place, value, list
}

// itemKey is what tells an item from its neighbours in the list at place.
func itemKey(place string, item reflect.Value) (string, bool) {
	switch item.Kind() {
	case reflect.String:
		return item.String(), setLists.Has(place)
	case reflect.Struct:
		for _, name := range []string{"Name", "Type"} {
			if f := item.FieldByName(name); f.IsValid() && f.Kind() == reflect.String {
				return f.String(), true
			}
		}
	}
	return "", false
}
