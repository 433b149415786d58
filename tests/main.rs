mod privilege;
